"""What the study compares: the bases of each set, the settings, and the configs that both give.

A seed trains one start with InfoNCE on each view; every setting continues it for the same epochs with its own
positives. The settings of a family share its start.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cpr_fast import experiments
from cpr_fast.config import Config, Cycle, InitConfig, MiningConfig, load
from cpr_fast.mining.stages import idle_stages, stage_keep

SEEDS = (0, 1, 2, 3, 4)
TRIAL_SEEDS = 100  # seeds from here on are for choosing a base
QUICKSTART = Path(experiments.__file__).with_name("quickstart.toml")

Family = Literal["coclr", "iic"]


@dataclass(frozen=True)
class Base:
    """What all settings of a set have in common, besides the quick start's settings.

    Attributes:
        size, stride: of a clip of 8 frames; pixels, and frames of the video.
        memory: number of entries of the queue.
        start, epochs: epochs for RGB and for flow, of the start and of a setting. The learning rate falls after 80 %.
        iic: epochs of the start and of a setting of IIC, which trains both views in one cycle.
        iic_optimizer: "sgd", IIC's, with its learning rate of .01, or "adam", that of the other settings.
    """

    size: int = 24
    stride: int = 1
    memory: int = 512
    start: tuple[int, int] = (16, 34)
    epochs: tuple[int, int] = (16, 16)
    iic: tuple[int, int] = (30, 30)
    iic_optimizer: Literal["sgd", "adam"] = "sgd"


# The first that passes its trial is the base of the set; see `chosen_base`.
CANDIDATES = {
    "synthetic": (Base(),),
    "jhmdb": (
        Base(stride=3, start=(10, 20), epochs=(8, 8)),
        Base(stride=3, start=(10, 20), epochs=(8, 8), size=32),
        Base(stride=3, start=(20, 40), epochs=(10, 10)),
    ),
    "shrec17": (
        Base(stride=3, start=(5, 10), epochs=(3, 3), iic=(8, 15), iic_optimizer="adam"),
        Base(stride=3, start=(5, 10), epochs=(3, 3), size=32, iic=(8, 15), iic_optimizer="adam"),
        Base(stride=3, start=(10, 20), epochs=(4, 4), iic=(8, 15), iic_optimizer="adam"),
    ),
}
TRIAL = ("start", "untrained", "infonce", "ubernce")  # the settings that a trial runs, with seed TRIAL_SEEDS
MARGIN = 0.02  # of two-stream mAP, by which a trial must show learning and the use of labels


@dataclass(frozen=True)
class Setting:
    """How a setting continues the start.

    Attributes:
        mining: how the cycles choose positives; None: the setting is the start itself, or its network before training.
        changes: replaced fields of `MiningConfig`.
        top_k: of each of five equal cycles [paper, Table 3]; empty: one cycle for each view.
        queue: factor on the entries of the queue.
        way: a name in `better_mining.WAYS`; empty: as in the paper.
        rounds: number of times that a cycle of each view comes, with as many epochs in all.
    """

    mining: Literal["none", "label", "cascade"] | None
    changes: dict[str, Any] = field(default_factory=dict)
    family: Family = "coclr"
    protocol: Literal["paper", "coclr"] = "paper"
    top_k: tuple[int, ...] = ()
    queue: int = 1
    way: str = ""
    rounds: int = 1


def _cpr(stages: int, ratio: float = 0.5, **changes: Any) -> Setting:
    mining = {key: changes.pop(key) for key in ("anchor",) if key in changes}
    return Setting("cascade", {"stages": stages, "ratio": ratio, **mining}, **changes)


# In the order in which they run. "start" first, because all others of a seed need it.
SETTINGS: dict[str, Setting] = {
    "start": Setting(None),
    "untrained": Setting(None),
    "infonce": Setting("none"),
    "coclr": _cpr(1),
    "cpr_n3": _cpr(3),
    "cpr_n5": _cpr(5),
    "cpr_n7": _cpr(7),
    "ubernce": Setting("label"),
}
LATER: dict[str, Setting] = {
    "cpr_n3_r.3": _cpr(3, 0.3),
    "cpr_n3_r.8": _cpr(3, 0.8),
    "cpr_n7_r.8": _cpr(7, 0.8),
    "cpr_n7_query_anchor": _cpr(7, anchor="query"),
    "cpr_n7_coclr_protocol": _cpr(7, protocol="coclr"),
    "infonce_memory_x2": Setting("none", queue=2),
    "coclr_memory_x2": _cpr(1, queue=2),
    "cpr_n7_memory_x2": _cpr(7, queue=2),
    "iic_start": Setting(None, family="iic"),
    "iic": Setting("none", family="iic"),
    "iic_cpr_fixed": _cpr(5, family="iic", top_k=(5,) * 5),
    "iic_cpr_progressive": _cpr(5, family="iic", top_k=(1, 2, 3, 4, 5)),
}
# What might mine better than the paper's cascade, each against "cpr_n7".
BETTER: dict[str, Setting] = {
    "backbone_features": _cpr(7, way="backbone"),
    "past_views": _cpr(7, way="past_views"),
    "mutual_neighbours": _cpr(7, way="mutual"),
    "siblings_agree": _cpr(7, way="siblings"),
    "confidence_weights": _cpr(7, way="confidence"),
    "warm_start": _cpr(7, way="warm_start"),
    "short_cycles": _cpr(7, rounds=2),
}
# Why CoCLR is worse than InfoNCE where it was found to be: its wrong positives, or the steps in which its memory fills.
# Why IIC + CPR is worse than IIC: its wrong positives, or its five cycles, each of which begins with an empty bank.
REASONS: dict[str, Setting] = {
    "coclr_only_right": _cpr(1, way="only_right"),
    "coclr_warm_start": _cpr(1, way="warm_start"),
    "iic_cpr_one_cycle": _cpr(5, family="iic", top_k=(5,)),
    "iic_cpr_only_right": _cpr(5, family="iic", top_k=(5,), way="only_right"),
}
# The main table's settings once more, for seeds whose further settings continue another start than the main table's.
AGAIN_OF = ("infonce", "coclr", "cpr_n3", "cpr_n7")
AGAIN: dict[str, Setting] = {f"{name}_again": SETTINGS[name] for name in AGAIN_OF}
ALL = SETTINGS | LATER | BETTER | REASONS | AGAIN


def passes(trial: dict[str, float]) -> bool:
    """Returns whether a trial, {setting: two-stream mAP}, shows that InfoNCE learns and that labels help it."""
    unlabelled = max(trial["start"], trial["infonce"])
    return unlabelled >= trial["untrained"] + MARGIN and trial["ubernce"] >= unlabelled + MARGIN


def chosen_base(name: str, trials: Sequence[dict[str, float]]) -> Base | None:
    """Returns the base of a set after the trials of its first candidates, in order; None if another trial is needed.

    It is the first candidate that passes; if none does, the one in which InfoNCE gains most over the untrained network.
    """
    candidates = CANDIDATES[name]
    for base, trial in zip(candidates, trials, strict=False):
        if passes(trial):
            return base
    if len(trials) < len(candidates):
        return None
    gains = [max(trial["start"], trial["infonce"]) - trial["untrained"] for trial in trials]
    return candidates[gains.index(max(gains))]


def start_of(setting: str) -> str:
    """Returns the name of the start that a setting continues."""
    return "iic_start" if ALL[setting].family == "iic" else "start"


def config_of(base: Base, setting: str, seed: int, index: Path, runs: Path) -> Config:
    """Returns the config of a start, or of what a setting does after it. `index` and `runs` decide paths only."""
    chosen, start = ALL[setting], setting in ("start", "iic_start")
    config = load(QUICKSTART)
    config = replace(config, "data", index=str(index), size=base.size, stride=base.stride)
    config = replace(config, "memory", size=base.memory * chosen.queue)
    config = replace(config, "run", out=str(runs / setting), seed=seed)
    config = replace(config, "loss", protocol=chosen.protocol)
    config = replace(config, "mining", **dataclasses.asdict(MiningConfig(**{"stages": 5, **chosen.changes})))
    if chosen.family == "iic":
        config = _iic(config, base.iic_optimizer)
    if not start:
        last = str(runs / start_of(setting) / "checkpoints" / "last.pt")
        views = ("rgb",) if chosen.family == "iic" else ("rgb", "flow")
        config = replace(config, "model", init=InitConfig(**dict.fromkeys(views, last)))
    cycles = _cycles(base, chosen, start)
    return replace(config, "schedule", cycles=cycles)


def _iic(config: Config, optimizer: str) -> Config:
    """Returns the config with the network and the memory bank of IIC's recipe (table5_iic.toml), and its optimiser.

    Its clips are cut and coloured like those of the other settings, since its own are of 112 pixels.
    """
    width = round(512 * config.model.width)
    config = replace(config, "memory", kind="bank", bank_momentum=0.5)
    config = replace(config, "model", head="pooled", feature_dim=width, shared=True)
    config = replace(config, "loss", intra_negatives="repeat")
    if optimizer == "adam":
        return config
    return replace(config, "optim", name="sgd", lr=0.01, momentum=0.9, weight_decay=1e-4)


def _cycles(base: Base, setting: Setting, start: bool) -> tuple[Cycle, ...]:
    mining = "none" if start else setting.mining
    if setting.family == "coclr":
        epochs = base.start if start else base.epochs
        return tuple(
            Cycle(view, part, mining, (_drop(part),))
            for turn in range(setting.rounds)
            for view, number in zip(("rgb", "flow"), epochs, strict=True)
            if (part := number // setting.rounds + (turn < number % setting.rounds))
        )
    total = base.iic[0 if start else 1]
    parts = setting.top_k or (None,)
    if total % len(parts):
        raise ValueError(f"iic: expected a multiple of {len(parts)} epochs, one part for each cycle, got {total}")
    each = total // len(parts)
    return tuple(Cycle("rgb", each, mining, (_drop(each),), top_k=top_k, other="residual") for top_k in parts)


def _drop(epochs: int) -> int:
    """Returns the epoch at which the learning rate falls."""
    return max(1, round(0.8 * epochs))


def replace(config: Config, section: str, **changes: Any) -> Config:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **changes)})


def keeps(config: Config, training_videos: int) -> list[tuple[int, ...]]:
    """Returns how many entries each stage keeps, for every cycle that mines by a cascade.

    Raises:
        ValueError: a stage selects nothing, so that the setting would be one of fewer stages.
    """
    size = training_videos if config.memory.kind == "bank" else config.memory.size
    found = []
    for cycle in (cycle for cycle in config.schedule.cycles if cycle.mining == "cascade"):
        top_k = config.mining.top_k if cycle.top_k is None else cycle.top_k
        keep = stage_keep(config.mining.stages, size, config.mining.ratio, top_k)
        if idle := idle_stages(keep, size):
            raise ValueError(f"stages {idle} of the cascade that keeps {keep} of {size} entries select nothing")
        found.append(keep)
    return found


# Settings that came after the registration; their defaults compute what was computed before.
LATER_SETTINGS = {
    "data": {"features": "", "window": 8192, "fps": 0.0, "pictures_fps": 0.0, "disk_cache": "",
             "disk_cache_gib": 20.0},
    "model": {"args": {}, "pool": "auto", "mean": (), "std": ()},
    "memory": {"final_ema_momentum": None, "shard": False},
    "health": {"mining_queries": None, "online_measure": "auto"},
    "optim": {"schedule": "steps", "final_lr": 0.0, "warmup_epochs": 0.0, "betas": (0.9, 0.999), "eps": 1e-8,
              "final_weight_decay": None, "decay_norms_and_biases": True, "clip_norm": 0.0},
    "run": {"shard": False, "wandb": False, "trackio": False},
}  # fmt: skip
LATER_OF_CYCLES = ("schedule", "final_lr", "warmup_epochs", "weight_decay", "final_weight_decay", "momentum",
                   "ema_momentum", "final_ema_momentum")  # fmt: skip


def without_later_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a config as a dict without the later settings that have their defaults."""
    kept = {name: dict(section) if isinstance(section, dict) else section for name, section in config.items()}
    for section, settings in LATER_SETTINGS.items():
        for key, default in settings.items():
            value = kept[section][key]
            if (tuple(value) if isinstance(value, list) else value) == default:
                del kept[section][key]
    kept["schedule"]["cycles"] = [
        {key: value for key, value in cycle.items() if key not in LATER_OF_CYCLES or value is not None}
        for cycle in kept["schedule"]["cycles"]
    ]
    return kept


def settings_digest(base: Base, setting: str, data: str) -> str:
    """Returns what identifies the settings of a row: a digest of all that its result depends on but the seed.

    Args:
        data: the digest of the videos' description.
    """
    paths = Path("index.csv"), Path()
    names = [start_of(setting)] + ([setting] if ALL[setting].mining is not None else [])
    parts = [without_later_settings(config_of(base, name, 0, *paths).to_dict()) for name in names]
    return hashlib.sha256(json.dumps([setting, data, parts], sort_keys=True).encode()).hexdigest()[:12]
