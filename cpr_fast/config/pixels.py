"""The pixel normalisation of every augmentation, in a module that imports neither DALI nor torch."""

from __future__ import annotations

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Normalisation = tuple[tuple[float, float, float], tuple[float, float, float]]


def normalisation(augment: str) -> Normalisation:
    """Returns the (mean, std) of the channels, for values in 0..1 and for every view: ImageNet's [CoCLR], or none
    [IIC]."""
    return ((0.0,) * 3, (1.0,) * 3) if augment == "iic" else (IMAGENET_MEAN, IMAGENET_STD)
