"""The encoders to evaluate, from one checkpoint, or from several with one view each, such as the published ones."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from cpr_fast.config import Config, DataConfig, ModelConfig
from cpr_fast.config.checks import MANY
from cpr_fast.config.sections import STORED
from cpr_fast.data.features.index import StoredClips
from cpr_fast.data.features.names import is_store
from cpr_fast.data.features.store import Description, FeatureStore
from cpr_fast.data.index.index import Index
from cpr_fast.errors import InputError
from cpr_fast.evaluate.features.recipe import clip_settings
from cpr_fast.evaluate.features.results import Checkpoints, checkpoint_files, home
from cpr_fast.models import Encoder, FeatureEncoder
from cpr_fast.weights.checkpoint import load_encoders


@dataclass(frozen=True)
class Pretrained:
    """Encoders in eval mode by view, and the config that each was trained with. All have the same clip settings.

    Attributes:
        name: The checkpoints, as the user gave them, and --pictures-fps if it was given.
        home: The folder of the first checkpoint's evaluations.
        stored: The store whose features the "encoders" return as they are; None if they compute features.
    """

    name: str
    home: Path
    encoders: dict[str, Encoder]
    configs: dict[str, Config]
    stored: FeatureStore | None = None

    @property
    def features(self) -> Path:
        """The folder of the feature cache."""
        return self.home / "features"

    @property
    def evaluations(self) -> Path:
        """The folder of the results."""
        return self.home / "evaluations"

    @property
    def data(self) -> DataConfig:
        """The data settings of the first checkpoint; those that decide the clips are equal in all checkpoints."""
        return next(iter(self.configs.values())).data

    def open(self, option: str, path: str | Path) -> Index:
        """Returns the videos of an index or, for networks on stored features, the clips of a store.

        Raises InputError that names `option`, if the networks cannot encode what is there.
        """
        data = self.data
        if not data.features:
            if is_store(path):
                raise InputError(
                    f"{option}: expected the index of videos, which {self.name!r} encodes, got the store of features "
                    f"{str(path)!r}"
                )
            return Index.load(path, require_flow=data.flow == "stored").long_enough(data)
        if self.stored is not None:
            if not os.path.samefile(path, self.home):
                StoredClips.open(path, option)  # if it is not a store, that is the error
                raise InputError(
                    f"{option}: expected the store {self.name!r} itself, whose features are evaluated as they are, got "
                    f"{str(path)!r}; give CHECKPOINT and {option} the same store"
                )
            return StoredClips(self.stored)
        clips = StoredClips.open(path, option)
        clips.store.require_views(option, list(self.encoders))
        for view, config in self.configs.items():
            self._require_width(option, view, config, clips.store)
        return clips

    def _require_width(self, option: str, view: str, config: Config, store: FeatureStore) -> None:
        """Raises InputError if the features of a view are not as wide as those that its head was trained on. Of the
        latter the config holds the width with the zeros that are appended, and only the store itself the own width."""
        wanted, found = config.model.args["width"], store.width
        if wanted == found and is_store(config.data.features):
            views = Description.load(Path(config.data.features)).views
            wanted, found = views.get(view, found), store.about.views[view]
        if wanted != found:
            raise InputError(
                f"{option}: expected features of {wanted} dimensions of the view {view!r}, as {self.name!r} was "
                f"trained on, got {found} in {str(store.folder)!r}"
            )

    def at_pictures_fps(self, rate: float | None) -> Pretrained:
        """Returns the same networks for pictures of this rate, whose name states it; None changes nothing. Raises
        InputError that names --pictures-fps."""
        if rate is None:
            return self
        if not 0 < rate <= MANY:
            raise InputError(
                f"--pictures-fps: expected frames per second, more than 0 and at most {MANY}, got {rate:g}"
            )
        if not self.data.fps:
            raise InputError(
                f"--pictures-fps: expected it with a network that samples videos by time (data.fps), got {rate:g} with "
                f"{self.name!r}, which takes every frame"
            )
        configs = {view: replace(config, data=replace(config.data, pictures_fps=rate))
                   for view, config in self.configs.items()}  # fmt: skip
        return replace(self, name=f"{self.name} --pictures-fps {rate:g}", configs=configs)

    def of_videos(self, task: str, option: str = "CHECKPOINT") -> Pretrained:
        """Returns the same networks. Raises InputError that names `option`, if they encode features, and `task` needs
        networks that encode videos."""
        if self.data.features:
            raise InputError(f"{option}: {task} expects a network that encodes videos, got {self.name!r} of features")
        return self


def _of_store(folder: Path) -> Pretrained:
    """Returns the features of a store, in place of networks."""
    store, views = FeatureStore(folder, "CHECKPOINT"), {}
    for view in store.about.views:
        views[view] = FeatureEncoder(store.width, store.width).eval()
        views[view].backbone = nn.Identity()
    model = ModelConfig(arch=STORED, args={"width": store.width}, feature_dim=store.width)
    config = Config(data=DataConfig(features=str(folder)), model=model)
    return Pretrained(str(folder), folder, views, dict.fromkeys(views, config), stored=store)


def load_pretrained(checkpoints: Checkpoints, *, device: str = "cpu", pictures_fps: float | None = None) -> Pretrained:
    """Loads the encoders of checkpoints that `pretrain` or `import-checkpoint` wrote.

    Args:
        checkpoints: One or several arguments: FILE loads every view that the file holds, VIEW=FILE only that view. Or
            one store of features, whose features are then taken as they are.
        pictures_fps: Replaces data.pictures_fps of the checkpoints: the frames per second of the extracted frames and
            LMDB records that are to be encoded, which may be others than those of the training.
    Raises:
        InputError: No file, a view that a file lacks or that is given twice, or files with different clip settings; or
            a rate of pictures that is none, or for networks without data.fps, which encode every frame.
    """
    encoders: dict[str, Encoder] = {}
    configs: dict[str, Config] = {}
    files = checkpoint_files(checkpoints)
    if len(files) == 1 and files[0][0] is None and is_store(files[0][1]):
        return _of_store(files[0][1]).at_pictures_fps(pictures_fps)
    for wanted, file in files:
        config, held = load_encoders(file, device=device)
        if wanted is not None and wanted not in held:
            raise InputError(f"CHECKPOINT: {str(file)!r} holds the views {', '.join(held)}, got {wanted}={file}")
        for view in held if wanted is None else [wanted]:
            if view in encoders:
                raise InputError(
                    f"CHECKPOINT: expected each view once, got {view!r} again from {str(file)!r}; "
                    f"VIEW=FILE takes a single view of a file"
                )
            encoders[view], configs[view] = held[view], config
        first = clip_settings(next(iter(configs.values())).data)
        for key, value in clip_settings(config.data).items():
            if value != first[key]:
                raise InputError(
                    f"CHECKPOINT: expected files of equal data.{key}, got {first[key]!r} in {str(files[0][1])!r} and "
                    f"{value!r} in {str(file)!r}"
                )
    name = " ".join(str(file) if wanted is None else f"{wanted}={file}" for wanted, file in files)
    return Pretrained(name, home(files[0][1]), encoders, configs).at_pictures_fps(pictures_fps)
