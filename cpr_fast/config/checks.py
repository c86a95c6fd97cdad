"""Checks of a whole config: values out of range, and settings that contradict each other."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any

from cpr_fast.config.pixels import least_clip
from cpr_fast.config.sections import (
    CONVOLUTIONAL,
    FACTORIES,
    QUARTERS,
    STORED,
    ClassifierConfig,
    ConfigError,
    Cycle,
    DataConfig,
    HealthConfig,
    LossConfig,
    MemoryConfig,
    MiningConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    with_cycle,
)
from cpr_fast.wording import counted

LARGEST = 2**31 - 1  # of the whole numbers in a config, except for seeds, which may have 64 bits
MANY = 1024  # limit of threads, prepared batches and frames per second: more are a mistake that can exhaust the memory
# Settings of `optim` and `memory` that a cycle can replace, besides the learning rate.
_NOT_NEGATIVE = ("final_lr", "warmup_epochs", "weight_decay", "final_weight_decay")
_FRACTIONS = ("momentum", "ema_momentum", "final_ema_momentum")


def check_sections(
    *,
    data: DataConfig,
    model: ModelConfig,
    memory: MemoryConfig,
    mining: MiningConfig,
    loss: LossConfig,
    optim: OptimConfig,
    schedule: ScheduleConfig,
    probe: ClassifierConfig,
    finetune: ClassifierConfig,
    health: HealthConfig,
    run: RunConfig,
) -> None:
    """Checks every section of a config, and the settings of one section against those of another.

    Raises ConfigError, which states the key, what was found and what was expected.
    """
    sections = {"data": data, "model": model, "memory": memory, "mining": mining, "loss": loss, "optim": optim,
                "schedule": schedule, "probe": probe, "finetune": finetune, "health": health, "run": run}  # fmt: skip
    for name, section in sections.items():
        _check_numbers(name, section)
    _check_positive(
        {
            "data.frames": data.frames,
            "data.stride": data.stride,
            "data.size": data.size,
            "data.crop_attempts": data.crop_attempts,
            "data.batch_size": data.batch_size,
            "data.workers": data.workers,
            "data.prefetch": data.prefetch,
            "model.width": model.width,
            "model.feature_dim": model.feature_dim,
            "model.conv_std": model.conv_std,
            "memory.size": memory.size,
            "memory.shuffle_bn_groups": 1 if memory.shuffle_bn_groups is None else memory.shuffle_bn_groups,
            "mining.stages": 1 if mining.stages == "auto" else mining.stages,
            "mining.top_k": mining.top_k,
            "loss.temperature": loss.temperature,
            "optim.eps": optim.eps,
            "optim.accumulate": optim.accumulate,
            "schedule.gamma": schedule.gamma,
            "run.log_every": run.log_every,
            "run.keep_checkpoints": run.keep_checkpoints,
            "health.online_videos": health.online_videos,
        }
    )
    _check_ranges(data, memory, mining, loss, health, run)
    _check_features(data, model, loss, health)
    _check_optimiser(optim, memory, schedule)
    _check_sharding(memory, mining, loss, optim, schedule, health, run)
    _check_network(model)
    _check_clips(data, model)
    _check_method(data, model, memory, loss, optim)
    check_classifier("probe", probe)
    check_classifier("finetune", finetune)
    if not schedule.cycles:
        raise ConfigError("schedule.cycles: expected at least one cycle, got none")
    for i, cycle in enumerate(schedule.cycles):
        _check_cycle(f"schedule.cycles[{i}]", cycle, memory, mining)


def _check_numbers(where: str, value: Any) -> None:
    """Checks that all numbers of a section are finite, and that its whole numbers are not absurdly large.

    NaN would pass as a value that is not too small, and an infinite learning rate destroys the weights.
    """
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            _check_numbers(f"{where}.{field.name}", getattr(value, field.name))
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            _check_numbers(f"{where}[{i}]", item)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{with_cycle(where)}: expected a finite number, got {value}")
    elif isinstance(value, int):
        most = 2**63 - 1 if where == "run.seed" else MANY if where in ("data.workers", "data.prefetch") else LARGEST
        if abs(value) > most:
            raise ConfigError(f"{with_cycle(where)}: expected at most {most:,}, got {value:,}")


def _check_positive(values: Mapping[str, float]) -> None:
    for where, value in values.items():
        if not value > 0:
            raise ConfigError(f"{where}: expected a positive number, got {value}")


def _check_ranges(
    data: DataConfig,
    memory: MemoryConfig,
    mining: MiningConfig,
    loss: LossConfig,
    health: HealthConfig,
    run: RunConfig,
) -> None:
    fractions = {"memory.bank_momentum": memory.bank_momentum, "loss.self_positive_drop": loss.self_positive_drop}
    for where, value in fractions.items():
        if not 0 <= value <= 1:
            raise ConfigError(f"{where}: expected a fraction in 0..1, got {value}")
    for where, value in {"data.cache_gib": data.cache_gib, "run.checkpoint_every": run.checkpoint_every,
                         "run.stall_timeout_s": run.stall_timeout_s,
                         "health.online_every": health.online_every}.items():  # fmt: skip
        if value < 0:
            raise ConfigError(f"{where}: expected 0 or more, got {value}")
    _check_positive({"data.disk_cache_gib": data.disk_cache_gib})
    for where, value in {"data.crop_area": data.crop_area, "mining.ratio": mining.ratio}.items():
        if not 0 < value <= 1:
            raise ConfigError(f"{where}: expected a fraction in (0, 1], got {value}")
    if not run.out:
        raise ConfigError("run.out: expected the name of a folder, got ''")


def _check_sharding(
    memory: MemoryConfig,
    mining: MiningConfig,
    loss: LossConfig,
    optim: OptimConfig,
    schedule: ScheduleConfig,
    health: HealthConfig,
    run: RunConfig,
) -> None:
    """Checks the settings that cannot be combined with run.shard, and with memory.shard."""
    averaged = loss.protocol if any(cycle.mining == "label" for cycle in schedule.cycles) else "paper"
    for switch, where, value, expected in (
        ("run", "optim.precision", optim.precision, ("fp32", "bf16")),
        ("run", "optim.name", optim.name, ("adam", "adamw", "sgd")),
        ("run", "run.compile", run.compile, ("none",)),
        ("run", "health.online_every", health.online_every, (0,)),  # processes encode unequal numbers of windows
        ("memory", "memory.kind", memory.kind, ("queue",)),
        ("memory", "loss.protocol", averaged, ("paper",)),  # with mining = "label", it is computed in plain torch
        ("memory", "run.dump_memory", run.dump_memory, (False,)),
    ):
        if (run.shard if switch == "run" else memory.shard) and value not in expected:
            wanted = " or ".join(map(repr, expected))
            raise ConfigError(f"{where}: expected {wanted} with {switch}.shard = true, got {value!r}")
    if memory.shard and mining.stages == "auto":  # the choice reads all features
        raise ConfigError("mining.stages: expected a number with memory.shard = true, got 'auto'")


def _check_optimiser(optim: OptimConfig, memory: MemoryConfig, schedule: ScheduleConfig) -> None:
    """Checks the settings of the optimiser and of the key encoder, and those that each cycle replaces."""
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        raise ConfigError(f"optim.betas: expected two fractions in [0, 1), got {list(optim.betas)}")
    if optim.clip_norm < 0:
        raise ConfigError(f"optim.clip_norm: expected 0 or more, got {optim.clip_norm}")
    _check_replaceable("optim", optim)
    _check_replaceable("memory", memory)
    for i, cycle in enumerate(schedule.cycles):
        where, used = f"schedule.cycles[{i}]", cycle.applied_to(optim)
        _check_replaceable(where, cycle)
        if cycle.epochs >= 1 and used.warmup_epochs > cycle.epochs:
            key = with_cycle(f"{'optim' if cycle.warmup_epochs is None else where}.warmup_epochs")
            most = f"the {counted(cycle.epochs, 'epoch')} of cycle {i + 1}"
            raise ConfigError(f"{key}: expected at most {most}, got {used.warmup_epochs:g}")
        if used.final_lr > used.lr:
            key = with_cycle(f"{'optim' if cycle.final_lr is None else where}.final_lr")
            most = f"the learning rate of cycle {i + 1}, {used.lr:g}"
            raise ConfigError(f"{key}: expected at most {most}, got {used.final_lr:g}")


def _check_replaceable(where: str, settings: OptimConfig | MemoryConfig | Cycle) -> None:
    """Checks the settings that a cycle can replace, as far as `settings` gives them."""
    for name in ("lr", *_NOT_NEGATIVE, *_FRACTIONS):
        value, key = getattr(settings, name, None), with_cycle(f"{where}.{name}")
        if value is None:
            continue
        if name == "lr" and not value > 0:
            raise ConfigError(f"{key}: expected a positive number, got {value}")
        if name in _NOT_NEGATIVE and value < 0:
            raise ConfigError(f"{key}: expected 0 or more, got {value}")
        if name in _FRACTIONS and not 0 <= value <= 1:
            raise ConfigError(f"{key}: expected a fraction in 0..1, got {value}")


def batch_norm_groups(groups: int | None, clips: int, processes: int, parts: int = 1) -> int:
    """Returns the number of BatchNorm groups G of a step.

    Args:
        groups: `memory.shuffle_bn_groups`; None means one group for each part of each process.
        clips: number of clips per step, over all processes.
        parts: number of parts in which each process encodes its clips (`optim.accumulate`).
    Raises:
        ConfigError: the groups would not divide every part equally.
    """
    if groups is None:
        groups = processes * parts
    if groups % (processes * parts):
        of_each = f" x {parts} parts of a step (optim.accumulate)" if parts > 1 else ""
        raise ConfigError(
            f"memory.shuffle_bn_groups: expected a multiple of the "
            f"{counted(processes, 'process', 'processes')}{of_each}, got {groups}"
        )
    if clips % groups:
        of = counted(clips, "clip")
        raise ConfigError(f"memory.shuffle_bn_groups: expected a divisor of the {of} of a step, got {groups}")
    return groups


def _check_network(model: ModelConfig) -> None:
    """Checks the name of the network, and that its settings are those that it has."""
    if model.arch in CONVOLUTIONAL:
        for key in ("args", "mean", "std"):
            if getattr(model, key):
                raise ConfigError(
                    f"model.{key}: expected none with model.arch {model.arch!r}, whose settings are model.width and "
                    f"model.conv_std, got {getattr(model, key)!r}"
                )
        if model.pool == "class_token":
            raise ConfigError(
                f"model.pool: 'class_token' expects tokens, which model.arch {model.arch!r} does not have"
            )
        return
    if model.arch == STORED:
        return
    module, name = model.factory or ("", "")
    if not (module and name.isidentifier()):
        known = [*CONVOLUTIONAL, *FACTORIES]
        close = difflib.get_close_matches(model.arch, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(
            f"model.arch: expected one of {', '.join(map(repr, known))}, 'package.module:factory' or "
            f"'path/to/file.py:factory', got {model.arch!r}{hint}"
        )
    for key, default in (("width", ModelConfig.width), ("conv_std", ModelConfig.conv_std)):
        if getattr(model, key) != default:
            raise ConfigError(
                f"model.{key}: expected {default}, because only {', '.join(CONVOLUTIONAL)} have it and model.arch is "
                f"{model.arch!r}, whose arguments are in model.args; got {getattr(model, key)}"
            )
    _check_json("model.args", model.args)
    if bool(model.mean) != bool(model.std):
        raise ConfigError(f"model.mean, model.std: expected both or neither, got {model.mean} and {model.std}")
    for key, values in (("mean", model.mean), ("std", model.std)):
        if values and (len(values) != 3 or (key == "std" and min(values) <= 0)):
            positive = " positive" if key == "std" else ""
            raise ConfigError(f"model.{key}: expected three{positive} numbers (red, green, blue), got {list(values)}")


def _check_features(data: DataConfig, model: ModelConfig, loss: LossConfig, health: HealthConfig) -> None:
    """Checks that the settings fit a store of features, if there is one."""
    measured = 1 if health.mining_queries is None else health.mining_queries
    _check_positive({"data.window": data.window, "health.mining_queries": measured})
    width = model.args.get("width")
    if model.arch == STORED and (list(model.args) != ["width"] or not isinstance(width, int) or width < 1):
        raise ConfigError(f"model.args: expected {{'width': D}} with model.arch {STORED!r}, got {model.args}")
    if not data.features:
        if model.arch == STORED:
            raise ConfigError(f"data.features: expected a store of features, because model.arch is {STORED!r}, got ''")
        return
    if model.head != "mlp":
        raise ConfigError(
            f"model.head: expected 'mlp' with data.features, which is what is trained, got {model.head!r}"
        )
    if loss.intra_negatives != "none":
        raise ConfigError(
            f"loss.intra_negatives: expected 'none' with data.features, whose clips have no frames, got "
            f"{loss.intra_negatives!r}"
        )


def _check_json(where: str, value: Any) -> None:
    """Checks that a value can be written to config.json and read again without a change."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ConfigError(f"{where}: expected names as keys, got {key!r}")
            _check_json(f"{where}.{key}", item)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _check_json(f"{where}[{i}]", item)
    elif not isinstance(value, str | int | float | None) or (isinstance(value, float) and not math.isfinite(value)):
        raise ConfigError(f"{where}: expected text, a finite number, true, false, a list or a table, got {value!r}")


def _check_clips(data: DataConfig, model: ModelConfig) -> None:
    """Checks that a clip is at least as large as the network needs, and that rates are rates of frames."""
    for where, value in {"data.fps": data.fps, "data.pictures_fps": data.pictures_fps}.items():
        if not 0 <= value <= MANY:
            raise ConfigError(f"{where}: expected frames per second in 0..{MANY}, 0 for none, got {value}")
    if data.pictures_fps and not data.fps:
        raise ConfigError(f"data.pictures_fps: expected 0 without data.fps, got {data.pictures_fps}")
    frames, size = least_clip(model.arch)
    if data.frames < frames or data.size < size:
        raise ConfigError(
            f"data.frames, data.size: model.arch {model.arch!r} expects at least {counted(frames, 'frame')} of {size} "
            f"pixels, got {data.frames} of {data.size}"
        )


def _check_cycle(where: str, cycle: Cycle, memory: MemoryConfig, mining: MiningConfig) -> None:
    if cycle.epochs < 1:
        raise ConfigError(f"{with_cycle(f'{where}.epochs')}: expected at least 1, got {cycle.epochs}")
    if early := [epoch for epoch in cycle.milestones if epoch < 1]:
        raise ConfigError(f"{with_cycle(f'{where}.milestones')}: expected epochs of 1 or more, got {early[0]}")
    top_k = mining.top_k if cycle.top_k is None else cycle.top_k
    if cycle.mining == "cascade" and not (top_k >= 1 and (memory.kind != "queue" or top_k <= memory.size)):
        raise ConfigError(f"{with_cycle(f'{where}.top_k')}: expected 1..memory.size = {memory.size}, got {top_k}")
    if cycle.mining == "cascade" and mining.stages == "auto" and memory.kind == "batch":
        raise ConfigError(
            "mining.stages: 'auto' expects memory.kind = 'queue' or 'bank', because a batch is new in every step and "
            "too small to judge a cascade by, got 'batch'"
        )
    if cycle.other == cycle.view:
        raise ConfigError(f"{with_cycle(f'{where}.other')}: expected another view than {cycle.view!r}")


def _check_method(
    data: DataConfig, model: ModelConfig, memory: MemoryConfig, loss: LossConfig, optim: OptimConfig
) -> None:
    """Checks the settings of a method that need certain other settings."""
    kind = memory.kind
    if kind == "queue" and memory.size < data.batch_size:
        raise ConfigError(
            f"memory.size: expected at least data.batch_size = {data.batch_size} entries, got {memory.size}"
        )
    if model.shared and kind != "bank":
        raise ConfigError(f"model.shared: expected memory.kind = 'bank', got {kind!r}")
    if loss.intra_negatives != "none" and not model.shared:
        raise ConfigError("loss.intra_negatives: expected model.shared = true with it")
    if loss.intra_negatives == "shuffle" and data.frames < QUARTERS:
        raise ConfigError(f"loss.intra_negatives: 'shuffle' expects {QUARTERS} frames or more, got {data.frames}")
    if optim.accumulate > 1 and (kind == "batch" or model.shared):
        raise ConfigError(
            "optim.accumulate: expected 1 with memory.kind 'batch' and model.shared, whose losses need all "
            "features of a step at once; model.recompute saves memory there"
        )
    if data.batch_size % optim.accumulate:
        raise ConfigError(
            f"optim.accumulate: expected a divisor of data.batch_size = {data.batch_size}, got {optim.accumulate}"
        )


def check_classifier(where: str, config: ClassifierConfig) -> None:
    """Checks the settings of a classifier. Raises ConfigError naming `where` and the setting."""
    _check_numbers(where, config)
    for name in ("epochs", "batch_size", "lr", "gamma", "layer_decay"):
        if not getattr(config, name) > 0:
            raise ConfigError(f"{where}.{name}: expected a positive number, got {getattr(config, name)}")
    if config.backbone_lr < 0:
        raise ConfigError(f"{where}.backbone_lr: expected 0 or more, got {config.backbone_lr}")
    if not 0 <= config.momentum <= 1:
        raise ConfigError(f"{where}.momentum: expected a fraction in 0..1, got {config.momentum}")
    for name in ("patience", "min_lr", "weight_decay"):
        if getattr(config, name) < 0:
            raise ConfigError(f"{where}.{name}: expected 0 or more, got {getattr(config, name)}")
    for name in ("dropout", "validation"):
        if not 0 <= getattr(config, name) < 1:
            raise ConfigError(f"{where}.{name}: expected a fraction in [0, 1), got {getattr(config, name)}")
    if config.schedule == "plateau":
        if config.validation == 0:
            raise ConfigError(
                f"{where}.validation: expected a positive fraction with schedule = 'plateau', which watches the loss "
                "on these videos, got 0.0"
            )
        if config.gamma >= 1:
            raise ConfigError(f"{where}.gamma: expected less than 1 with schedule = 'plateau', got {config.gamma}")
    if config.validation and getattr(config, "inputs", "clips") == "features":
        raise ConfigError(
            f"{where}.validation: expected 0 with inputs = 'features', which trains on all training videos, got "
            f"{config.validation}"
        )
