"""Changing the number of epochs of a config: the epochs of its cycles and their milestones are scaled together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from cpr_fast.config.config import Config
from cpr_fast.config.sections import ConfigError, Cycle


def scale_epochs(config: Config, epochs: int) -> Config:
    """Returns the config with exactly `epochs` epochs in total, divided among its cycles in the same proportions as
    before.

    The milestones of each cycle are scaled along, see `scale_milestones`, and so are the warm-ups.

    Raises ConfigError if there are fewer epochs than cycles.
    """
    cycles = config.schedule.cycles
    if epochs < len(cycles):
        raise ConfigError(f"--epochs: expected at least one epoch for each of the {len(cycles)} cycles, got {epochs}")
    share = epochs / sum(cycle.epochs for cycle in cycles)
    warmup = config.optim.warmup_epochs * share
    scaled = tuple(
        dataclasses.replace(
            cycle,
            epochs=n,
            milestones=scale_milestones(cycle.milestones, cycle.epochs, n),
            warmup_epochs=_scaled_warmup(cycle, n, warmup),
        )
        for cycle, n in zip(cycles, share_epochs([cycle.epochs for cycle in cycles], epochs), strict=True)
    )
    return dataclasses.replace(
        config,
        optim=dataclasses.replace(config.optim, warmup_epochs=warmup),
        schedule=dataclasses.replace(config.schedule, cycles=scaled),
    )


def _scaled_warmup(cycle: Cycle, epochs: int, common: float) -> float | None:
    """Returns the `warmup_epochs` of a cycle for a new number of epochs; None if it can use `common`, that of all."""
    if cycle.warmup_epochs is not None:
        return min(cycle.warmup_epochs * (epochs / cycle.epochs), float(epochs))
    return None if common <= epochs else float(epochs)


def scale_milestones(milestones: Sequence[int], old: int, new: int) -> tuple[int, ...]:
    """Returns the milestones of a training of `old` epochs for one of `new` epochs.

    A milestone is the number of epochs after which the learning rate falls, so it takes effect if it lies in
    1..new - 1. Milestones that would fall on the same epoch or after the last one are moved to neighbouring epochs. If
    there are more milestones than such epochs, the first ones are dropped. Milestones that never took effect in the old
    training are dropped, too.
    """
    effective = sorted(milestone for milestone in milestones if milestone < old)
    count = min(len(effective), new - 1)
    scaled: list[int] = []
    for i, milestone in enumerate(effective[len(effective) - count :]):
        first = scaled[-1] + 1 if scaled else 1
        last = new - count + i  # leaves one epoch for each milestone that follows
        scaled.append(min(max(round(milestone * new / old), first), last))
    return tuple(scaled)


def share_epochs(parts: Sequence[int], total: int) -> list[int]:
    """Shares `total` in proportion to `parts` by the largest remainder; each share is at least 1.

    `total` must be at least the number of parts.
    """
    whole = sum(parts)
    shares = [max(1, part * total // whole) for part in parts]
    while (rest := total - sum(shares)) != 0:
        owed = [part * total - share * whole for part, share in zip(parts, shares, strict=True)]
        if rest > 0:
            shares[owed.index(max(owed))] += 1
        else:  # raising small shares to 1 made the sum too large
            largest = min((i for i, share in enumerate(shares) if share > 1), key=owed.__getitem__)
            shares[largest] -= 1
    return shares
