"""The pixels of clips: the normalisation of every augmentation, and how many a backbone needs. Imports neither DALI nor
torch."""

from __future__ import annotations

from cpr_fast.config.sections import CONVOLUTIONAL

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Normalisation = tuple[tuple[float, float, float], tuple[float, float, float]]


def normalisation(augment: str) -> Normalisation:
    """Returns the (mean, std) of the channels, for values in 0..1 and for every view: ImageNet's [CoCLR], or none
    [IIC]."""
    return ((0.0,) * 3, (1.0,) * 3) if augment == "iic" else (IMAGENET_MEAN, IMAGENET_STD)


def least_clip(arch: str) -> tuple[int, int]:
    """Returns the smallest number of frames, and of pixels of a side, of a clip that a backbone can read; (1, 1) for a
    network of the user, which is asked when it is built."""
    if arch not in CONVOLUTIONAL:
        return 1, 1
    return (5, 17) if arch.startswith("s3d") else (8, 16)
