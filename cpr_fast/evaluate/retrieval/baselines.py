"""What a trained network is compared with: the same network untrained, and baselines from pixels and raw motion.

They use the same decoded windows as the network and the same retrieval. Each baseline is the strongest simple version
of its kind, because a weak baseline would make the method look better than it is.

Letters: N windows, T frames, H x W pixels.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cpr_fast.config import Config
from cpr_fast.config.pixels import IMAGENET_MEAN, IMAGENET_STD
from cpr_fast.data.index.index import Index
from cpr_fast.errors import InputError
from cpr_fast.evaluate.features.cache import digest, weights_digest
from cpr_fast.evaluate.features.embedding import Embedding, encoder_embeddings
from cpr_fast.evaluate.features.pretrained import Pretrained
from cpr_fast.evaluate.features.recipe import Recipe
from cpr_fast.models import Encoder, build_encoder
from cpr_fast.runtime import distributed
from cpr_fast.runtime.files import replacing
from cpr_fast.weights.tensors import save_tensors, stored_tensors

ZERO_FLOW = 128 / 255  # the grey level of zero motion
THUMBNAIL = 16  # height and width of the single frame, pixels
CALIBRATION_VIDEOS = 32  # evenly spaced in the index, so that all classes occur
CALIBRATION_WINDOWS = 8  # per video, evenly spaced; all windows of long videos would take longer than the evaluation

log = logging.getLogger(__name__)


def calibration_videos(index: Index) -> Index:
    """Returns the videos that the untrained network's BatchNorm statistics are computed from."""
    return Index(index[i] for i in range(0, len(index), math.ceil(len(index) / CALIBRATION_VIDEOS)))


def untrained_encoders(configs: Mapping[str, Config], seed: int, device: str) -> dict[str, Encoder]:
    """Returns randomly initialised encoders in eval mode; `calibrate_batch_norm` computes their statistics."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return {view: build_encoder(config.model, config.data).to(device).eval() for view, config in configs.items()}


def on_stored_features(pretrained: Pretrained, how: Recipe, seed: int, device: str) -> dict[str, Embedding]:
    """Returns the embeddings to compare on a store of features: the projections of the trained heads and of untrained
    ones, and the features as they are, which `pretrained` may also be itself."""
    encoders = {view: encoder.to(device) for view, encoder in pretrained.encoders.items()}
    keys = dict.fromkeys(encoders, "")
    if pretrained.stored is not None:
        return encoder_embeddings("stored", encoders, how, keys)
    untrained = untrained_encoders(pretrained.configs, seed, device)
    stored = {f"stored/{view}": Embedding(view, lambda features: features, how.metric) for view in encoders}
    return (
        encoder_embeddings("trained", encoders, how, keys)
        | encoder_embeddings("untrained", untrained, how, keys)
        | stored
    )


class StoredStatistics:
    """The BatchNorm statistics of untrained encoders in a file, so that they are computed once.

    Args:
        folder: The folder of the file, see `FeatureCache`.
        encoders: The encoders before their statistics are computed.
        identity: Everything else that the statistics depend on.
    """

    def __init__(self, folder: Path, encoders: Mapping[str, Encoder], identity: str) -> None:
        self.path = folder / f"untrained-{digest(*map(weights_digest, encoders.values()), identity)}.safetensors"
        self._buffers = {f"{view}.{name}": buffer for view, encoder in encoders.items()
                         for name, buffer in encoder.named_buffers()}  # fmt: skip

    def load(self) -> bool:
        """Copies the stored statistics into the encoders of every process; returns False if there are none."""
        stored = distributed.from_main(self._read)
        if stored is None:
            return False
        for name, buffer in self._buffers.items():
            buffer.copy_(stored[name])
        return True

    def _read(self) -> dict[str, Tensor] | None:
        stored = stored_tensors(self.path, "the statistics are computed again")
        same = (
            stored is not None
            and stored.keys() == self._buffers.keys()
            and all(stored[n].shape == b.shape for n, b in self._buffers.items())
        )
        return stored if same else None

    def store(self) -> None:
        """Writes the statistics in the first process; logs a warning if the folder cannot be written."""
        if not distributed.is_main():
            return
        try:
            with replacing(self.path) as temporary:
                save_tensors({name: buffer.cpu() for name, buffer in self._buffers.items()}, temporary)
        except (InputError, OSError) as error:
            log.warning("the untrained network cannot be stored in %s: %s", self.path.parent, error)


def single_frame(clips: Tensor) -> Tensor:
    """Returns the middle frame as a 16x16 RGB thumbnail, centred per channel: [N, 3, T, H, W] -> [N, 768].

    The cosine similarity of centred thumbnails is their normalised cross-correlation, which ignores brightness.
    """
    frame = _pixels(clips[:, :, clips.shape[2] // 2])  # [N, 3, H, W]
    thumbnail = F.adaptive_avg_pool2d(frame, THUMBNAIL)
    return (thumbnail - thumbnail.mean((2, 3), keepdim=True)).flatten(1)


def mean_colour(clips: Tensor) -> Tensor:
    """Returns the mean red, green and blue of the clip: [N, 3, T, H, W] -> [N, 3]."""
    return _pixels(clips).mean((2, 3, 4))


def mean_flow(clips: Tensor) -> Tensor:
    """Returns the mean of v, u, |v| and |u|: flow clips [N, 3, T, H, W], channels (128, v, u) -> [N, 4]."""
    motion = _pixels(clips)[:, 1:] - ZERO_FLOW
    return torch.cat([motion.mean((2, 3, 4)), motion.abs().mean((2, 3, 4))], 1)


def _pixels(clips: Tensor) -> Tensor:
    """Reverses the ImageNet normalisation: [N, 3, ...] to values in 0..1."""
    shape = (1, 3) + (1,) * (clips.dim() - 2)
    return clips * clips.new_tensor(IMAGENET_STD).view(shape) + clips.new_tensor(IMAGENET_MEAN).view(shape)


# The last argument is the key of stored features. If a function changes, its key must get a new number.
BASELINES = {
    "single_frame/rgb": Embedding("rgb", single_frame, "cosine", "single_frame 1"),
    "mean_colour/rgb": Embedding("rgb", mean_colour, "euclidean", "mean_colour 1"),
    "mean_flow/flow": Embedding("flow", mean_flow, "euclidean", "mean_flow 1"),
}
