"""Pretraining: encoders, memory, mining and the loop that ties them to the data."""
