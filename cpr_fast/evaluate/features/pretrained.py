"""The encoders to evaluate: of one checkpoint, or of several that hold a view each, as the published ones do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cpr_fast.config import Config, DataConfig
from cpr_fast.errors import InputError
from cpr_fast.evaluate.features.recipe import clip_settings
from cpr_fast.evaluate.features.results import Checkpoints, checkpoint_files, home
from cpr_fast.models import Encoder
from cpr_fast.weights.checkpoint import load_encoders


@dataclass(frozen=True)
class Pretrained:
    """Encoders in eval mode and, by view as well, the config that each was trained with. Their clips are cut alike.

    Attributes:
        name: the checkpoints, as they were given.
        home: the folder that evaluations belong to, the first checkpoint's.
    """

    name: str
    home: Path
    encoders: dict[str, Encoder]
    configs: dict[str, Config]

    @property
    def features(self) -> Path:
        """Where their features are kept."""
        return self.home / "features"

    @property
    def evaluations(self) -> Path:
        """Where results are kept."""
        return self.home / "evaluations"

    @property
    def data(self) -> DataConfig:
        return next(iter(self.configs.values())).data


def load_pretrained(checkpoints: Checkpoints, *, device: str = "cpu") -> Pretrained:
    """The encoders of checkpoints as written by `pretrain` or `import-checkpoint`.

    Args:
        checkpoints: one or several of FILE, for every view that it holds, and VIEW=FILE, for that view alone.
    Raises:
        InputError: no file, a view that a file lacks or that comes twice, or files that cut their clips differently.
    """
    encoders: dict[str, Encoder] = {}
    configs: dict[str, Config] = {}
    files = checkpoint_files(checkpoints)
    for wanted, file in files:
        config, held = load_encoders(file, device=device)
        if wanted is not None and wanted not in held:
            raise InputError(f"checkpoint: {str(file)!r} holds the views {', '.join(held)}, got {wanted}={file}")
        for view in held if wanted is None else [wanted]:
            if view in encoders:
                raise InputError(
                    f"checkpoint: expected each view once, got {view!r} again from {str(file)!r}; "
                    f"VIEW=FILE takes one view of a file"
                )
            encoders[view], configs[view] = held[view], config
        first = clip_settings(next(iter(configs.values())).data)
        for key, value in clip_settings(config.data).items():
            if value != first[key]:
                raise InputError(
                    f"checkpoint: expected files of one data.{key}, got {first[key]!r} in {str(files[0][1])!r} and "
                    f"{value!r} in {str(file)!r}"
                )
    name = " ".join(str(file) if wanted is None else f"{wanted}={file}" for wanted, file in files)
    return Pretrained(name, home(files[0][1]), encoders, configs)
