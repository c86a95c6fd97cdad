"""The config of a run: all sections together. Functions receive only the section that they need, never the whole
config."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from cpr_fast.config.build import build
from cpr_fast.config.checks import check_sections
from cpr_fast.config.sections import (
    ClassifierConfig,
    DataConfig,
    HealthConfig,
    LossConfig,
    MemoryConfig,
    MiningConfig,
    ModelConfig,
    OptimConfig,
    ProbeConfig,
    RunConfig,
    ScheduleConfig,
)

# Settings of `data` that change no clip: where videos are read from, and how fast.
READING = ("index", "workers", "prefetch", "cache_gib", "disk_cache", "disk_cache_gib")


@dataclass(frozen=True)
class Config:
    """All settings of a run. Raises ConfigError if a setting is out of range or contradicts another one."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    mining: MiningConfig = field(default_factory=MiningConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    finetune: ClassifierConfig = field(default_factory=ClassifierConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        check_sections(**{field.name: getattr(self, field.name) for field in dataclasses.fields(self)})

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as plain data, as config.json holds them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """Builds a config from plain data; settings that are not given have their defaults."""
        return build(cls, values, "")
