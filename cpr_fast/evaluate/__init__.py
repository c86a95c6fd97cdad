"""Judging a run: mining quality, retrieval, baselines."""
