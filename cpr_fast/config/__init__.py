"""Defines every setting of a run, reads settings from files, and checks them.

Imports only `errors` and `wording`, never torch; every other package of `cpr_fast` may import it.
"""

from cpr_fast.config.config import READING, Config
from cpr_fast.config.load import load, override_classifier
from cpr_fast.config.sections import (
    QUARTERS,
    ClassifierConfig,
    ConfigError,
    Cycle,
    DataConfig,
    HealthConfig,
    InitConfig,
    LossConfig,
    MemoryConfig,
    Mining,
    MiningConfig,
    ModelConfig,
    OptimConfig,
    Precision,
    ProbeConfig,
    RunConfig,
    ScheduleConfig,
    View,
)

__all__ = [
    "QUARTERS",
    "READING",
    "ClassifierConfig",
    "Config",
    "ConfigError",
    "Cycle",
    "DataConfig",
    "HealthConfig",
    "InitConfig",
    "LossConfig",
    "MemoryConfig",
    "Mining",
    "MiningConfig",
    "ModelConfig",
    "OptimConfig",
    "Precision",
    "ProbeConfig",
    "RunConfig",
    "ScheduleConfig",
    "View",
    "load",
    "override_classifier",
]
