"""Reading a config from a TOML file or from a run's config.json, and changing single settings of it."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Any

from cpr_fast.config.checks import check_classifier
from cpr_fast.config.config import Config
from cpr_fast.config.sections import ClassifierConfig, ConfigError


def load(path: str | Path) -> Config:
    """The config of a TOML file, or of a run's config.json.

    Raises ConfigError naming the key, what came and what was expected.
    """
    try:
        text = Path(path).read_text()
        values = json.loads(text) if Path(path).suffix == ".json" else tomllib.loads(text)
    except FileNotFoundError:
        raise ConfigError(f"config file {str(path)!r} does not exist") from None
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        kind = "JSON" if Path(path).suffix == ".json" else "TOML"
        raise ConfigError(f"config file {str(path)!r} is not valid {kind}: {error}") from None
    return Config.from_dict(values)


def override_classifier(where: str, config: ClassifierConfig, **changes: Any) -> ClassifierConfig:
    """`config` with those changes that are not None, checked; milestones move along with `epochs`.

    Raises ConfigError naming `where` and the setting.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    if "epochs" in given and "milestones" not in given:
        share = given["epochs"] / config.epochs
        given["milestones"] = tuple(max(1, round(milestone * share)) for milestone in config.milestones)
    changed = dataclasses.replace(config, **given)
    check_classifier(where, changed)
    return changed
