"""`cpr-fast init`."""

from __future__ import annotations

import math
import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cpr_fast.commands.inputs import require_at_least, require_file, require_other_file, require_suffix
from cpr_fast.commands.options import IndexPath, Json
from cpr_fast.commands.output import show
from cpr_fast.config.recipes import pretrain_command
from cpr_fast.errors import InputError
from cpr_fast.wording import counted

if TYPE_CHECKING:
    from cpr_fast.config import Config
    from cpr_fast.data.index.index import Index
    from cpr_fast.experiments.sizing import Facts, Sized

LONG_S = 15 * 60.0  # if the expected time is longer, `init` also prints how to shorten the run
MARGIN = 0.9  # share of --minutes for training steps; the rest is for the start, the checkpoints and the end


class Pace(NamedTuple):
    """The measured time of a step in seconds, the sentence about other programs, see `OtherPrograms`, and on which part
    of its clips it was measured, see `step_time`."""

    step_s: float
    busy: str = ""
    part: str = ""


def init(
    index: IndexPath,
    *,
    out: Path = Path("recipe.toml"),
    run: Path | None = None,
    epochs: int | None = None,
    minutes: float | None = None,
    seconds: float = 20.0,
    force: bool = False,
    json: Json = False,
) -> None:
    """Write a recipe that is sized to the videos of an index and to this machine, and print the expected time.

    Memory, batch size, stages and epochs are derived from the number of training videos and sources; comments in the
    recipe give the reasons. The expected time is measured: a few training steps and batches are run on these videos.

    Args:
        index: The index (CSV), as `cpr-fast index` wrote it.
        out: The recipe to write (TOML).
        run: The run folder that the recipe names; by default runs/NAME after the recipe, with a number if that holds a
            run already.
        epochs: Number of epochs of all cycles together; by default it follows from the number of videos.
        minutes: Reduce the number of epochs to as many as fit into this time, by the measured time of a step.
        seconds: How long to measure; 0 does not measure, and prints no expected time.
        force: Replace a recipe that exists.
    """
    _check_options(index, out, epochs, minutes, seconds, force)
    from cpr_fast.runtime.progress import announce

    announce("Loading the index and PyTorch")
    from cpr_fast.data.flow.names import flow_command
    from cpr_fast.experiments.sizing import sized_recipe
    from cpr_fast.runtime.files import new_run_folder, replacing

    videos, facts, gpu = _facts(index, epochs)
    folder = run or new_run_folder(Path("runs") / out.stem)
    named = os.path.relpath(index, out.parent), str(folder)
    whole = sized = sized_recipe(facts, *named, epochs)
    pace, device = None, "cuda" if gpu else "cpu"
    if minutes is not None:
        announce("Measuring the network of a training step, which takes some seconds")
        _require_enough(sized, Pace(_least_step_s(sized.config, device)), minutes, network_alone=True)
    if seconds:
        announce(f"Measuring training steps on these videos for about {seconds:.0f} s, longer on a busy machine")
        pace = _pace(videos, facts.split, sized.config, device, seconds)
    if minutes is not None and (fit := _epochs_that_fit(sized, pace, minutes)) < total_epochs(sized):
        sized = sized_recipe(facts, *named, fit)
    _require_new(out, force)  # again, because the measurement takes long and another command may have written it
    with replacing(out) as temporary:
        temporary.write_text(sized.text, encoding="utf-8")
    trained = pretrain_command([str(out)], folder, new := new_run_folder(folder))
    lines = [
        *_summary(out, facts, sized, pace),
        *_about_length(index, out, run, trained, whole, sized, pace, minutes),
        *_about_flow(videos, facts, sized.config, flow_command(index, videos)),
        *_doubts(videos, facts, sized.config, taken=new != folder),
    ]
    show(_result(out, facts, sized, pace), json, lines=lines, next_step=trained)


def _facts(index: Path, epochs: int | None) -> tuple[Index, Facts, bool]:
    """Returns the videos, what a recipe depends on, and whether there is a GPU. Refuses the index and the number of
    epochs before torch is imported."""
    from cpr_fast.data.index.index import Index
    from cpr_fast.experiments.sizing import Facts, sized_recipe, usable_cores

    videos = Index.load(index, require_flow=False)
    facts = Facts.of(videos, cores=usable_cores(), gpu=False)
    sized_recipe(facts, str(index), "runs/mine", epochs)
    import torch

    gpu = torch.cuda.is_available()
    return videos, replace(facts, gpu=gpu), gpu


def _check_options(
    index: Path, out: Path, epochs: int | None, minutes: float | None, seconds: float, force: bool
) -> None:
    require_file("INDEX", index)
    require_at_least("--seconds", 0, seconds)
    require_at_least("--epochs", 1, epochs)
    if minutes is not None and not minutes > 0:
        raise InputError(f"--minutes: expected more than 0, got {minutes}")
    if minutes is not None and not seconds:
        raise InputError("--minutes: expected --seconds above 0 with it, because the time of a step must be measured")
    if out.is_dir():
        raise InputError(f"--out: expected the name of a TOML file, but {str(out)!r} is a folder")
    require_other_file("--out", out, [index])
    require_suffix("--out", out, ".toml")
    _require_new(out, force)


def _require_new(out: Path, force: bool) -> None:
    if out.exists() and not force:
        raise InputError(f"--out: {str(out)!r} exists; give another name, or --force to replace it")


def _result(out: Path, facts: Facts, sized: Sized, pace: Pace | None) -> dict[str, Any]:
    return {
        "recipe": str(out),
        "videos": facts.videos,
        "with_flow": facts.with_flow,
        "epochs": total_epochs(sized),
        "steps": sized.steps,
        "step_s": pace and pace.step_s,
        "config": sized.config.to_dict(),
    }


def total_epochs(sized: Sized) -> int:
    """Returns the number of epochs of all cycles of a recipe."""
    return sum(cycle.epochs for cycle in sized.config.schedule.cycles)


def _epochs_that_fit(sized: Sized, pace: Pace, minutes: float) -> int:
    """Returns how many epochs of a recipe fit into a time. Raises InputError if not every cycle gets one."""
    _require_enough(sized, pace, minutes)
    return int(MARGIN * 60 * minutes / _epoch_s(sized, pace.step_s))


def _epoch_s(sized: Sized, step_s: float) -> float:
    return sized.steps / total_epochs(sized) * step_s


def _require_enough(sized: Sized, pace: Pace, minutes: float, *, network_alone: bool = False) -> None:
    """Raises InputError if a time is too short for an epoch of each cycle.

    Args:
        network_alone: Whether `pace` is the time of the network alone, which a step takes at least.
    """
    from cpr_fast.runtime.progress import about

    cycles, epoch_s = len(sized.config.schedule.cycles), _epoch_s(sized, pace.step_s)
    if cycles * epoch_s <= MARGIN * 60 * minutes:
        return
    least = cycles * epoch_s / 60 / MARGIN
    least = math.ceil(least) if least >= 10 else math.ceil(100 * least) / 100  # upwards, so that it is enough
    expected, takes = (
        (f"more than {least:,}", "an epoch takes more than")
        if network_alone
        else (f"at least {least:,}", "an epoch takes")
    )
    raise InputError(
        f"--minutes: expected {expected}, the time of one epoch for each of the {counted(cycles, 'cycle')} "
        f"({takes} {about(epoch_s)}), got {minutes:g}; --epochs {cycles} writes that recipe and prints its time"
        + (f". {pace.busy}" if pace.busy else "")
    )


def _least_step_s(config: Config, device: str) -> float:
    """Returns seconds that a step takes at least, without reading a video; 0 while other programs run, without which
    it may take a small part of the time."""
    import torch

    from cpr_fast.doctor.bottleneck import least_step_s
    from cpr_fast.runtime.busy import OtherPrograms

    views, others = len({cycle.view for cycle in config.schedule.cycles}), OtherPrograms()
    step_s = least_step_s(config, views, config.data.batch_size, device=torch.device(device))
    return 0.0 if others.sentence() else step_s


def _summary(out: Path, facts: Facts, sized: Sized, pace: Pace | None) -> list[str]:
    """Returns the sizes of the recipe and, where a step was measured, the expected time."""
    from cpr_fast.runtime.progress import about

    config, time = sized.config, "; the time was not measured (--seconds 0)"
    if pace:
        time = f": {about(sized.steps * pace.step_s)} at {_step_time(pace.step_s)} per step, as measured now{pace.part}"
    lines = [
        f"{out}: {counted(facts.videos, 'training video')} of {counted(facts.sources, 'source')}",
        f"batch of {config.data.batch_size}, memory of {config.memory.size}, {counted(config.mining.stages, 'stage')}, "
        f"{counted(config.mining.top_k, 'mined positive')}, views {config.schedule.cycles[0].view} and "
        f"{config.schedule.cycles[1].view}",
        f"{counted(total_epochs(sized), 'epoch')} of {counted(sized.steps // total_epochs(sized), 'step')}{time}",
    ]
    if pace and pace.busy:
        lines.append(f"  {pace.busy}")
    return lines


def _doubts(videos: Index, facts: Facts, config: Config, *, taken: bool) -> list[str]:
    """Returns the warnings that `cpr-fast pretrain` will give for the recipe, which few epochs or few videos cause, and
    one if the run folder is taken."""
    from cpr_fast.pretrain.run.checks import check_run, plan_cycles

    train = videos.select(facts.split)
    stored = config.data.flow == "stored"
    found = check_run(config, train, plan_cycles(config, len(train), 1), stored_flow=stored)
    if taken:
        found.append(f"{config.run.out!r} holds a run already; the command below names another folder")
    return [f"  warning: {text}" for text in found]


def _step_time(seconds: float) -> str:
    """Returns "0.034 s", "1.2 s" or "150 s": two digits, and no exponent for long steps."""
    return f"{seconds:.2g} s" if seconds < 10 else f"{float(f'{seconds:.2g}'):.0f} s"


def _about_length(
    index: Path, out: Path, run: Path | None, trained: str, whole: Sized, sized: Sized, pace: Pace | None,
    minutes: float | None,
) -> list[str]:  # fmt: skip
    """Returns what --minutes cut, and how to shorten a long run; nothing about a short one. `trained` is the command
    that trains the recipe."""
    from cpr_fast.runtime.progress import about

    if minutes is not None and pace:
        plan = f"{counted(total_epochs(whole), 'epoch')} ({about(whole.steps * pace.step_s)})"
        if sized is whole:
            return [f"  --minutes {minutes:g} cuts nothing: the whole plan of {plan} fits"]
        cut = [f"  cut from {plan} to fit --minutes {minutes:g}; fewer epochs learn less"]
        if pace.busy:
            cut.append("  on an idle machine the same --minutes gives a recipe of more epochs")
        return cut
    if pace and sized.steps * pace.step_s <= LONG_S:
        return []
    file = shlex.quote(str(out))
    again = f"cpr-fast init {shlex.quote(str(index))}" + ("" if str(out) == "recipe.toml" else f" --out {file}")
    again += "" if run is None else f" --run {shlex.quote(str(run))}"
    return [
        f"  to shorten it: `{again} --force --minutes 10` writes a recipe for 10 minutes, and",
        f"  `{trained} --epochs N` trains this one for N epochs in all; fewer epochs learn less",
    ]


def _about_flow(videos: Index, facts: Facts, config: Config, command: str) -> list[str]:
    """Returns how many videos have flow and what the recipe does without it, unless all of them have it."""
    have = sum(video.flow_path is not None for video in videos)
    if have == len(videos):
        return []
    training = ""
    if facts.videos < len(videos):
        training = f" ({facts.with_flow} of the {counted(facts.videos, 'training video')})"
    verb = "has" if have == 1 else "have"
    lines = [f"optical flow: {have} of {counted(len(videos), 'video')} {verb} it{training}"]
    if have:
        lines.append("  `cpr-fast flow` was stopped, is still running, or could not compute it for the others")
    if facts.with_flow == facts.videos:
        lines.append("  the recipe uses it; evaluating the flow encoder needs it for the other videos, too")
        return [*lines, f"  to complete it: {command}"]
    if config.data.flow == "on_the_fly":
        lines.append("  the recipe computes it on the GPU for each clip; stored flow makes the steps shorter")
    else:
        lines.append("  the recipe uses differences of frames (residual) as the second view instead")
    return [*lines, f"  to use stored flow: {command}, then this command again with --force"]


def _pace(videos: Index, split: str, config: Config, device: str, seconds: float) -> Pace:
    """Returns the measured time of a step: of the network or of the loader, whichever is slower."""
    import torch

    from cpr_fast.doctor.bottleneck import breakdown, step_time

    part = videos.select(split)
    views = tuple(dict.fromkeys(cycle.view for cycle in config.schedule.cycles))
    measured = breakdown(part, config, views, device=torch.device(device), seconds=seconds)
    step_s, clips = step_time(measured)
    return Pace(step_s, measured["other_programs"], clips)
