"""Scores of class probabilities: accuracy with its interval, accuracy per class, and the confusion matrix.

Letters: M videos, L classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.metrics import confusion_matrix, top_k_accuracy_score
from torch import Tensor

from cpr_fast.evaluate.features.intervals import source_interval


def classification_scores(
    probabilities: Tensor, labels: Tensor, sources: Tensor, classes: Sequence[str]
) -> dict[str, Any]:
    """Returns the scores of the predictions for M >= 1 labelled videos.

    Args:
        probabilities: [M, L] float.
        labels: [M] int64, 0..L-1.
        sources: [M] int64, equal for siblings.
        classes: L names.
    Returns:
        `accuracy`, its bootstrap interval over sources `accuracy_ci95`, `top5` (None for fewer than 6 classes),
        `mean_class_accuracy` over the classes that occur, `per_class` {name: accuracy, None for a class without
        videos}, `confusion` (rows are true classes, counts) and `videos`. Rates are fractions. If several
        classes have the highest probability, the first of them is predicted.
    """
    truth, scores = labels.numpy(), probabilities.numpy()
    predicted = scores.argmax(1)
    numbers = np.arange(len(classes))
    confusion = confusion_matrix(truth, predicted, labels=numbers)
    occurs = confusion.sum(1)
    rates = confusion.diagonal() / np.maximum(occurs, 1)
    hits = torch.from_numpy(predicted == truth)
    top5 = float(top_k_accuracy_score(truth, scores, k=5, labels=numbers)) if len(classes) > 5 else None
    return {
        "accuracy": hits.double().mean().item(),
        "accuracy_ci95": source_interval(hits, sources),
        "top5": top5,
        "mean_class_accuracy": float(rates[occurs > 0].mean()),
        "per_class": {n: float(r) if c else None for n, r, c in zip(classes, rates, occurs, strict=True)},
        "confusion": confusion.tolist(),
        "videos": len(truth),
    }
