"""Writes a store of the features of a data set: for each video some augmented clips, as pretraining cuts them, and
windows without augmentation, whose mean is the feature that evaluations use.

Letters: M samples of a video, D feature width.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from cpr_fast.config import READING, Config, ModelConfig, View, load
from cpr_fast.config.sections import InitConfig
from cpr_fast.data.clips.loader import WindowLoader
from cpr_fast.data.clips.sampling import Clips, Sources, plan_first, plan_windows
from cpr_fast.data.features.clips import Clip
from cpr_fast.data.features.store import Description
from cpr_fast.data.features.write import Computed, file_states, planned_shards, write_store
from cpr_fast.data.files.relative import Relative
from cpr_fast.data.index.index import Index
from cpr_fast.data.storage.media import file_of
from cpr_fast.data.storage.unreadable import not_read
from cpr_fast.errors import InputError
from cpr_fast.evaluate.features.cache import digest, weights_digest
from cpr_fast.evaluate.features.pretrained import Pretrained, load_pretrained
from cpr_fast.evaluate.features.recipe import settings_without
from cpr_fast.models import Encoder, build_encoder
from cpr_fast.weights.checkpoint import load_initial

SHARD_VIDEOS = 256  # what is computed again after a stop
WINDOWS = 2  # without augmentation, of a video that is longer than a clip
_OF_THE_MACHINE = (*READING, "features", "window", "split", "batch_size")

log = logging.getLogger(__name__)


def load_networks(given: Sequence[str], pictures_fps: float | None = None) -> Pretrained:
    """Returns the encoders of `--encoder`: checkpoints (FILE or VIEW=FILE); or one network for one view, a recipe
    (FILE.toml) or a factory (MODULE:FACTORY or FILE.py:FACTORY), perhaps with VIEW= before it.

    The weights of a recipe are those that its `model.init` names for the view; or those that the factory loads; or
    random ones of the built-in networks, which the name of what is returned and the log then say.

    `pictures_fps`: see `load_pretrained`.

    Raises:
        InputError: not one network, or one that encodes stored features; or see `load_initial`.
    """
    view, equals, name = given[0].partition("=")
    view, name = (view, name) if equals and view in get_args(View) else ("rgb", given[0])
    is_factory = ":" in name and not Path(name).exists()
    if not is_factory and not name.endswith(".toml"):
        return load_pretrained(given, pictures_fps=pictures_fps).of_videos("embed", "--encoder")
    if len(given) > 1:
        raise InputError(f"--encoder: expected one network, or checkpoints, got {' '.join(given)}")
    config = Config(model=ModelConfig(arch=name)) if is_factory else load(name)
    networks = Pretrained(name, Path(), {}, {view: config}).of_videos("embed", "--encoder")
    file = getattr(config.model.init, view)
    weights = load_initial(dataclasses.replace(config.model, init=InitConfig(**{view: file})))
    with torch.random.fork_rng([]):
        torch.manual_seed(config.run.seed)
        encoder = build_encoder(config.model, config.data).eval()
    if file:
        encoder.load_state_dict(weights[view])
        name = f"{name} with the weights of {file}"
    elif ":" not in config.model.arch:  # a built-in network; others may have loaded their weights
        log.warning("embed: the weights of %s are random, because %s has no model.init.%s: use the features only as a "
                    "baseline", config.model.arch, name, view)  # fmt: skip
        name = f"{name} with random weights (run.seed {config.run.seed})"
    return dataclasses.replace(networks, name=name, encoders={view: encoder}).at_pictures_fps(pictures_fps)


def embed_videos(
    index: Index,
    networks: Pretrained,
    out: Path,
    *,
    samples: int = 2,
    dtype: str = "float16",
    device: str = "cpu",
    seed: int = 0,
    share: tuple[int, int] = (0, 1),
    progress: bool = False,
) -> dict[str, Any]:
    """Writes a store of the features of every video of `index`: those of the backbone, before any head.

    Sample m of a video is its first clip in epoch m of a pretraining with this seed; the draws depend on the position
    of the video in the index.

    Args:
        samples: M.
        share: Which shards to compute, see `write_store`.
    Returns:
        What `write_store` returns, and `skipped`, (path, reason) of the files that could not be read.
    Raises:
        InputError: see `write_store`, also for a store of the same videos before one of their files, or of those of
            their flow, was changed; or a view has no flow, or the network refuses the clips.
    """
    if samples < 1:
        raise InputError(f"--samples: expected at least 1, got {samples}")
    data, encoders = networks.data, {v: encoder.to(device) for v, encoder in networks.encoders.items()}
    relative, sources = Relative(out), Sources.of(index, data)
    clips = [Clip(relative(v.path), v.label, v.source, v.split) for v in index]
    settings = settings_without(data, _OF_THE_MACHINE)
    inputs = (file_of(path) for video in index for path in (video.path, video.flow_path) if path is not None)
    files = file_states(inputs, relative)
    source = digest(json.dumps([settings, samples, dtype, seed, torch.device(device).type, clips, files]),
                    *(f"{view} {weights_digest(encoder)}" for view, encoder in encoders.items()))  # fmt: skip
    about = Description({view: encoder.width for view, encoder in encoders.items()}, samples, True, dtype,
                        dict.fromkeys(encoders, networks.name), source,
                        planned_shards(len(index), SHARD_VIDEOS))  # fmt: skip
    skipped: list[tuple[Path, str]] = []

    def compute(positions: range) -> Computed:
        def plan(video: int) -> Clips:
            number = positions[video]
            augmented = [plan_first(sources, np.array([number]), data, seed, m) for m in range(samples)]
            windows = plan_windows(sources, number, data, WINDOWS)
            found = Clips.concatenate([*augmented, windows])
            return dataclasses.replace(found, video=np.full(len(found), video, np.int64))

        part = index.chosen(positions)
        with closing(WindowLoader(part, data, list(encoders), device=device, plan=plan)) as loader:
            found = _encoded(loader, encoders, [len(plan(video)) for video in range(len(part))], samples, positions)
            skipped.extend(loader.skipped)
        return found

    report = write_store(out, clips, about, compute, share=share, progress=progress)
    if skipped:
        log.warning("embed: %s", not_read(skipped, "left out"))
    return report | {"skipped": [(str(path), reason) for path, reason in skipped]}


@torch.inference_mode()
def _encoded(
    loader: WindowLoader, encoders: dict[str, Encoder], planned: Sequence[int], samples: int, positions: range
) -> Computed:
    """Returns the features of the videos of a loader whose clips could all be read: the first `samples` of each video
    apart, and the mean of the others. `planned` is the number of clips of each video."""
    videos = len(planned)
    first = {v: np.zeros((videos, samples, encoder.width), np.float32) for v, encoder in encoders.items()}
    rest = {v: np.zeros((videos, encoder.width), np.float64) for v, encoder in encoders.items()}
    seen = np.zeros(videos, np.int64)
    for batch in loader:
        features = {v: encoder.features(batch.clips[v]).float().cpu().numpy() for v, encoder in encoders.items()}
        for row, video in enumerate(batch.video.tolist()):
            for view, values in features.items():
                if seen[video] < samples:
                    first[view][video, seen[video]] = values[row]
                else:
                    rest[view][video] += values[row]
            seen[video] += 1
    kept = np.flatnonzero(seen == planned)
    windows = (np.array(planned) - samples)[kept, None]
    return Computed(
        np.array(positions, np.int64)[kept],
        {view: values[kept] for view, values in first.items()},
        {view: (values[kept] / windows).astype(np.float32) for view, values in rest.items()},
    )
