"""Explains the optimiser, the cycles with their steps, and the evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cpr_fast.config import ClassifierConfig, Config, OptimConfig
from cpr_fast.experiments.explain.section import Section, fraction, number
from cpr_fast.pretrain.run.checks import CyclePlan
from cpr_fast.wording import counted


def optimiser(config: Config) -> Section:
    """Explains the optimiser of the query encoder."""
    optim = config.optim
    momentum = f", momentum {fraction(optim.momentum)}" if optim.name == "sgd" else ""
    text = f"{optim.name}, {_rate(optim)}, weight decay {number(optim.weight_decay)}"
    if optim.final_weight_decay is not None:
        text += f" on a cosine to {number(optim.final_weight_decay)}"
    text += ("" if optim.decay_norms_and_biases else ", not of normalisations and biases") + momentum
    if (optim.betas, optim.eps) != ((0.9, 0.999), 1e-8) and optim.name in ("adam", "adamw"):
        text += f", betas {' and '.join(map(fraction, optim.betas))}, eps {number(optim.eps)}"
    text += f", {optim.precision}"
    if optim.clip_norm:
        text += f"; gradients are clipped at a norm of {number(optim.clip_norm)}"
    if optim.accumulate > 1:
        text += f"; gradients of {optim.accumulate} parts of a batch are summed"
    values = vars(optim) | {"betas": list(optim.betas)}
    return Section("Optimiser", [("", text)], {name: values[name] for name in values if name != "momentum" or momentum})


def _rate(optim: OptimConfig) -> str:
    """Returns the learning rate and its schedule, in which "steps" without a warm-up is not named."""
    text = f"learning rate {number(optim.lr)}"
    if optim.schedule == "cosine":
        text += f" on a cosine to {number(optim.final_lr)}"
    if optim.warmup_epochs:
        one = optim.warmup_epochs == 1
        text += f" after a warm-up of {number(optim.warmup_epochs)} epoch{'' if one else 's'}"
    return text


def schedule(config: Config, plans: Sequence[CyclePlan], published: Sequence[CyclePlan]) -> Section:
    """Explains the cycles: epochs, drops of the learning rate, steps, and the step from which they learn.

    Args:
        plans: the cycles on one process; published: the same on as many as `memory.shuffle_bn_groups`, the published
            number of GPUs.
    """
    first = plans[0]
    text = f"{counted(first.epoch_steps, 'step')} of {counted(first.clips, 'video')} on one process"
    if published[0].clips != first.clips:
        processes = published[0].clips // first.clips
        text += f"; {counted(published[0].epoch_steps, 'step')} of {published[0].clips} on {processes} (torchrun)"
    rows = [("epoch", text)]
    rows += [(f"cycle {plan.number + 1}", _cycle(config, plan)) for plan in plans]
    total = sum(plan.steps for plan in plans)
    epochs = sum(plan.cycle.epochs for plan in plans)
    whole = f"{counted(epochs, 'epoch')}, {counted(total, 'step')} on one process"
    rows.append(("in all", f"{whole}; `pretrain` measures its first steps and prints the expected time"))
    cycles = [
        {
            "view": plan.cycle.view,
            "mining": plan.cycle.mining,
            "epochs": plan.cycle.epochs,
            "milestones": list(plan.cycle.milestones),
            "steps": plan.steps,
            "learns_from_step": plan.waiting_steps + 1 if plan.waiting_steps < plan.steps else None,
            "memory_full_after": plan.fill_steps,
        }
        for plan in plans
    ]
    values = {"batch": first.clips, "steps_per_epoch": first.epoch_steps, "steps": total, "epochs": epochs,
              "step_s": None, "cycles": cycles}  # fmt: skip
    return Section("Schedule", rows, values)


def _cycle(config: Config, plan: CyclePlan) -> str:
    cycle = plan.cycle
    other = cycle.views(shared=config.model.shared)[1:]
    views = f"{cycle.view} and {other[0]}" if config.model.shared else cycle.view
    helped = f" with {other[0]}" if other and not config.model.shared else ""
    method = {"none": "InfoNCE", "label": "UberNCE", "cascade": f"cascade{helped}"}[cycle.mining]
    if cycle.mining == "cascade":
        top_k = config.mining.top_k if cycle.top_k is None else cycle.top_k
        method += f", up to top-{top_k}" if config.mining.stages == "auto" else f", top-{top_k}"
    optim, memory = cycle.applied_to(config.optim), cycle.applied_to(config.memory)
    falls = cycle.milestones and optim.schedule == "steps"
    drops = f", x{number(config.schedule.gamma)} at {', '.join(map(str, cycle.milestones))}" if falls else ""
    rate = f", {_rate(optim)}" if _rate(optim) != _rate(config.optim) else ""
    rate += "".join(
        f", {name.replace('_', ' ')} {number(value)}"
        for section, common in ((optim, config.optim), (memory, config.memory))
        for name, value in vars(section).items()
        if "weight_decay" in name or "momentum" in name
        if value != getattr(common, name)
    )
    if plan.waiting_steps < plan.steps:
        learns = f"; learns from step {plan.waiting_steps + 1:,}" if plan.waiting_steps else ""
    else:
        learns = "; NEVER LEARNS: it ends before the queue is full"
    if cycle.mining == "cascade" and plan.learns_while_filling and config.memory.kind == "bank":
        mines = plan.fill_steps < plan.steps
        learns += f", mines from step {plan.fill_steps + 1:,}" if mines else ", NEVER MINES: the bank is never full"
    epochs = counted(cycle.epochs, "epoch")
    return f"{views}, {method}: {epochs}{drops}{rate}; {counted(plan.steps, 'step')}{learns}"


def evaluation(config: Config) -> Section:
    """Explains the settings of the linear probe and of finetuning."""
    rows = [
        ("retrieve", "backbone features, cosine; `--recipe paper` (default), `coclr` or `iic`"),
        ("probe", _classifier(config.probe)),
        ("finetune", _classifier(config.finetune)),
    ]
    values = {name: _settings(getattr(config, name)) for name in ("probe", "finetune")}
    return Section("Evaluation", rows, values)


def _classifier(settings: ClassifierConfig) -> str:
    if settings.schedule == "plateau":
        drops = f" after {counted(settings.patience, 'epoch')} without a lower validation loss"
    else:
        drops = f" at {', '.join(map(str, settings.milestones))}" if settings.milestones else ""
    backbone = "frozen" if not settings.backbone_lr else number(settings.backbone_lr)
    return (
        f"{counted(settings.epochs, 'epoch')}" + (f", x{number(settings.gamma)}{drops}" if drops else "")
        + f"; {settings.optimizer}, learning rate {number(settings.lr)} (backbone {backbone}), weight decay "
        f"{number(settings.weight_decay)}, dropout {fraction(settings.dropout)}, batch {settings.batch_size}"
        + (f"; validated on {fraction(settings.validation)} of the training videos" if settings.validation else "")
    )  # fmt: skip


def _settings(settings: ClassifierConfig) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(settings).items()}
