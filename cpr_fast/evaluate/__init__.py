"""Evaluation of a checkpoint's encoders: stored features, retrieval, probing and finetuning.

Imports `data`, `models`, `weights` and `mining`; never `pretrain` or `report`.
"""
