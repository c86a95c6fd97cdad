"""Reading a config from a TOML file or from a run's config.json, and changing single settings of it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cpr_fast.config.checks import check_classifier
from cpr_fast.config.config import Config
from cpr_fast.config.epochs import scale_milestones
from cpr_fast.config.sections import ClassifierConfig, ConfigError
from cpr_fast.wording import expected

# A folder or file of a path that is a variable of the shell, as in "$HOME/videos" and "/data/${USER}".
_VARIABLE = re.compile(r"(^|/)\$(\w+|\{\w+\})(/|$)")


def load(path: str | Path) -> Config:
    """Reads the config of a TOML file, or of a run's config.json.

    Input files that a TOML file names (`data.index`, `data.features`, `model.init`, the file of `model.arch`,
    `model.args.path`) are relative to its folder; a file that is not found there is looked up relative to the working
    directory. In these and in `run.out` a leading `~` is the home folder.

    Raises:
        ConfigError: states the file, the key, what was found and what was expected.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise ConfigError(expected("a recipe (a TOML file)", path))
    kind = "JSON" if path.suffix == ".json" else "TOML"
    try:
        text = decoded(path.read_bytes())
        if not text.strip():
            raise ConfigError(f"config file {str(path)!r} is empty: expected a recipe, such as `cpr-fast init` writes")
        values = json.loads(text, object_pairs_hook=_unique_keys) if kind == "JSON" else tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise ConfigError(f"config file {str(path)!r}: expected UTF-8 text, got byte {error.start}: {error}") from None
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, _RepeatedKey) as error:
        if path.suffix == ".csv":
            raise ConfigError(
                f"CONFIG: expected a recipe, got the index {str(path)!r}; `cpr-fast init {path}` writes one for it"
            ) from None
        raise ConfigError(f"config file {str(path)!r} is not valid {kind}: {error}") from None
    except RecursionError:
        raise ConfigError(f"config file {str(path)!r}: its tables or lists are nested too deeply") from None
    if kind == "JSON" and isinstance(values, dict):
        values.pop("videos", None)  # a run's config.json also lists the videos it was trained on
    try:
        config = _expanded(Config.from_dict(values))
    except ConfigError as error:
        raise ConfigError(f"config file {str(path)!r}: {error}") from None
    return config if kind == "JSON" else _relative_to(config, path.parent)


class _RepeatedKey(ValueError):
    """A JSON object holds a key twice, of which `json` would keep the last; TOML files are checked by `tomllib`."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise _RepeatedKey(f"the key {key!r} occurs twice in one object, the values {values[key]!r} and {value!r}")
        values[key] = value
    return values


def decoded(data: bytes) -> str:
    """Returns a UTF-8 text without the byte-order mark and the line ends that editors on Windows write.

    Raises UnicodeDecodeError for another encoding.
    """
    return data.decode("utf-8-sig").replace("\r\n", "\n")


def expanded(name: str, path: str) -> str:
    """Returns a path that a user wrote, in which a leading `~` is the home folder, as in a shell.

    Raises ConfigError that names the setting or option if a part of the path is an environment variable, such as $HOME:
    without a shell nothing replaces it, and a folder of that name would be written.
    """
    if "$" in path and _VARIABLE.search(path) and not os.path.exists(path):
        raise ConfigError(
            f"{name}: expected a path, got {path!r}, in which no environment variable is replaced; write the folder "
            "itself, or ~ for the home folder"
        )
    return os.path.expanduser(path) if path.startswith("~") else path


def absolute_inputs(config: Config) -> Config:
    """Returns the config with absolute paths of its input files: its record is then valid in any working directory."""

    def absolute(setting: str, name: str) -> str:
        # An argument called `path` need not name a file.
        return str(Path(name).absolute()) if name and (setting != "model.args.path" or os.path.exists(name)) else name

    return _with_inputs(config, absolute)


def _expanded(config: Config) -> Config:
    run = dataclasses.replace(config.run, out=expanded("run.out", config.run.out))
    data = dataclasses.replace(config.data, disk_cache=expanded("data.disk_cache", config.data.disk_cache))
    config = dataclasses.replace(config, run=run, data=data)
    return _with_inputs(config, expanded)


def _relative_to(config: Config, folder: Path) -> Config:
    """Returns the config with the input files that are found in `folder` named relative to the working directory."""

    def found(_: str, name: str) -> str:
        return str(folder / name) if name and not Path(name).is_absolute() and (folder / name).exists() else name

    return _with_inputs(config, found)


def _with_inputs(config: Config, path: Callable[[str, str], str]) -> Config:
    """Returns the config with `path`, a function of (setting, name), applied to the name of every input file."""
    model, start = config.model, config.model.init
    init = dataclasses.replace(start, **{view: path(f"model.init.{view}", name) for view, name in vars(start).items()})
    arch, args = model.arch, dict(model.args)
    if model.factory and model.factory[0].endswith(".py"):
        arch = ":".join([path("model.arch", model.factory[0]), model.factory[1]])
    if isinstance(args.get("path"), str):
        args["path"] = path("model.args.path", args["path"])
    return dataclasses.replace(
        config,
        data=dataclasses.replace(
            config.data,
            index=path("data.index", config.data.index),
            features=path("data.features", config.data.features),
        ),
        model=dataclasses.replace(model, arch=arch, args=args, init=init),
    )


def override_classifier(where: str, config: ClassifierConfig, **changes: Any) -> ClassifierConfig:
    """Returns `config` with the changes that are not None, checked; milestones and the patience of a plateau are scaled
    along with `epochs`.

    Raises ConfigError naming `where` and the setting.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    if "epochs" in given and "milestones" not in given:
        check_classifier(where, dataclasses.replace(config, epochs=given["epochs"]))
        given["milestones"] = scale_milestones(config.milestones, config.epochs, given["epochs"])
        if config.schedule == "plateau":
            given["patience"] = round(config.patience * given["epochs"] / config.epochs)
    changed = dataclasses.replace(config, **given)
    check_classifier(where, changed)
    return changed
