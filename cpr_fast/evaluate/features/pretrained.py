"""The encoders to evaluate, from one checkpoint, or from several with one view each, such as the published ones."""

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
    """Encoders in eval mode by view, and the config that each was trained with. All have the same clip settings.

    Attributes:
        name: The checkpoints, as the user gave them.
        home: The folder of the first checkpoint's evaluations.
    """

    name: str
    home: Path
    encoders: dict[str, Encoder]
    configs: dict[str, Config]

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


def load_pretrained(checkpoints: Checkpoints, *, device: str = "cpu") -> Pretrained:
    """Loads the encoders of checkpoints that `pretrain` or `import-checkpoint` wrote.

    Args:
        checkpoints: One or several arguments: FILE loads every view that the file holds, VIEW=FILE only that view.
    Raises:
        InputError: No file, a view that a file lacks or that is given twice, or files with different clip settings.
    """
    encoders: dict[str, Encoder] = {}
    configs: dict[str, Config] = {}
    files = checkpoint_files(checkpoints)
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
    return Pretrained(name, home(files[0][1]), encoders, configs)
