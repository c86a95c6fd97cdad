"""Settings that name an epoch or a step after the end of the training, so that they never take effect."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cpr_fast.config.config import Config
from cpr_fast.config.sections import ClassifierConfig, with_cycle
from cpr_fast.wording import counted, listed


def unreached_epochs(config: Config) -> Iterator[str]:
    """Yields a sentence for every setting of pretraining that counts epochs and lies after the last one, and one for
    final learning rates with a schedule that has none."""
    used = [cycle.applied_to(config.optim) for cycle in config.schedule.cycles]
    for number, cycle in enumerate(config.schedule.cycles):
        if used[number].schedule == "steps":
            yield from _milestones(f"schedule.cycles[{number}]", "the cycle", cycle.milestones, cycle.epochs)
    if unused := [rates.final_lr for rates in used if rates.final_lr and rates.schedule == "steps"]:
        yield (
            f"final_lr is {unused[0]:g} in {counted(len(unused), 'cycle')} with schedule = 'steps', which does not use "
            "it. Set optim.schedule = 'cosine'"
        )
    every, epochs = config.health.online_every, sum(cycle.epochs for cycle in config.schedule.cycles)
    if every > epochs:
        yield (
            f"health.online_every is {every}, but the run ends after {counted(epochs, 'epoch')}: best.pt is "
            f"never written. Set it to {epochs} or less"
        )


def unreached_warmups(config: Config, learning: Sequence[int], epoch_steps: int) -> Iterator[str]:
    """Yields a sentence for every cycle that ends before its learning rate has risen, because it first waits for its
    queue.

    Args:
        learning: number of steps of each cycle that learn.
        epoch_steps: number of steps per epoch.
    """
    for number, (cycle, steps) in enumerate(zip(config.schedule.cycles, learning, strict=True)):
        warmup = cycle.applied_to(config.optim).warmup_epochs * epoch_steps
        if 0 < steps < warmup:
            yield (
                f"{with_cycle(f'schedule.cycles[{number}]')} learns in {counted(steps, 'step')}, fewer than the "
                f"{warmup:g} of its warm-up, so that its learning rate never rises to the one that is set. Set "
                "warmup_epochs lower, or memory.size"
            )


def unreached_steps(config: Config, steps: int) -> Iterator[str]:
    """Yields a sentence for every setting that counts steps and is larger than the number of `steps` of a run."""
    if config.run.log_every > steps:
        yield (
            f"run.log_every is {config.run.log_every}, but the run ends after "
            f"{counted(steps, 'step')}: no step is logged, only "
            f"epochs. Set it to {steps} or less"
        )
    if config.run.checkpoint_every > steps:
        yield (
            f"run.checkpoint_every is {config.run.checkpoint_every}, but the run ends after "
            f"{counted(steps, 'step')}: checkpoints "
            "are written at the ends of epochs only"
        )


def unreached_in_classifier(where: str, settings: ClassifierConfig) -> Iterator[str]:
    """Yields a sentence for every setting of the section `where`, "probe" or "finetune", after its last epoch."""
    if settings.schedule == "steps":
        yield from _milestones(where, "the training", settings.milestones, settings.epochs)
    elif settings.patience >= settings.epochs:
        yield (
            f"{where}.patience is {settings.patience}, but the training ends after "
            f"{counted(settings.epochs, 'epoch')}: its learning rate never falls. Set {where}.patience lower"
        )


def _milestones(where: str, what: str, milestones: Sequence[int], epochs: int) -> Iterator[str]:
    if late := [milestone for milestone in milestones if milestone >= epochs]:
        when = counted(late[0], "epoch") if len(late) == 1 else f"{listed([*map(str, late)])} epochs"
        yield (
            f"{with_cycle(f'{where}.milestones')} lets the learning rate fall after {when}, but {what} ends after "
            f"{counted(epochs, 'epoch')}. Set {where}.milestones below {epochs} or change the length with --epochs, "
            "which moves them along"
        )
