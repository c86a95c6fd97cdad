"""The pixels of clips: the normalisation of every augmentation, and how many a backbone needs. Imports neither DALI nor
torch, and nothing of this package: an exported folder holds a copy, see `cpr_fast.weights.modeling`."""

from __future__ import annotations

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_LEAST_CLIP = {"s3d": (5, 17), "s3dg": (5, 17), "s3d_milnce": (5, 17), "r3d": (8, 16), "r21d": (8, 16), "c3d": (8, 16)}

Normalisation = tuple[tuple[float, float, float], tuple[float, float, float]]


def normalisation(augment: str) -> Normalisation:
    """Returns the (mean, std) of the channels, for values in 0..1 and for every view: ImageNet's [CoCLR], or none
    [IIC]."""
    return ((0.0,) * 3, (1.0,) * 3) if augment == "iic" else (IMAGENET_MEAN, IMAGENET_STD)


def least_clip(arch: str) -> tuple[int, int]:
    """Returns the smallest number of frames, and of pixels of a side, of a clip that a backbone can read; (1, 1) for a
    network of the user, which is asked when it is built."""
    return _LEAST_CLIP.get(arch, (1, 1))
