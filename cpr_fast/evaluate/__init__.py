"""Evaluation of a checkpoint's encoders: stored features, retrieval, probing and finetuning.

Its packages import `config`, `runtime`, `ops`, `models`, `weights` and `data`, never `mining`, `pretrain` or `report`.
"""
