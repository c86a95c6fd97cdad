"""The quick start: synthetic videos, flow, InfoNCE, CPR, retrieval and report, in one command.

It calls the functions of the individual commands one after another. Finished parts are reused, so an interrupted quick
start continues where it stopped. Its settings are in `quickstart.toml` in the folder of this file.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cpr_fast.config import Config, load
from cpr_fast.errors import InputError

# Small and short, because the time of the optical flow grows with the number of pixels; but three times as long as a
# clip, so that two clips of a video differ.
VIDEOS = {"version": 5, "frames": 24, "width": 64, "height": 48}

log = logging.getLogger(__name__)


def quickstart(out: Path, *, seed: int = 0) -> dict[str, Any]:
    """Makes the data set, pretrains with CPR, evaluates and writes OUT/report.html.

    Returns the retrieval rates, the seconds of each part (`*_time_s`, and `*_cpu_s` of this process, which other
    programs change little) and the paths written.
    Raises InputError if OUT holds a run with another seed.
    """
    _check_same_seed(out, seed)
    from cpr_fast.data.flow.write import write_flow
    from cpr_fast.data.synthetic.videos import write_synthetic
    from cpr_fast.evaluate.retrieval.retrieve import retrieve
    from cpr_fast.pretrain.run.loop import pretrain
    from cpr_fast.report.page import write_report

    data, times = out / "data", {}

    with _timed(times, "1/5 videos", "synth"):
        index = write_synthetic(data, **VIDEOS, progress=True)
    with _timed(times, "2/5 optical flow", "flow"):
        write_flow(index, data / "flow", progress=True)
    with _timed(times, "3/5 pretraining: InfoNCE, then CPR", "pretrain"), _one_thread():
        last = out / "checkpoints" / "last.pt"
        pretrain(quickstart_config(index, out, seed), resume="auto")
    with _timed(times, "4/5 retrieval, beside the untrained network and pixel baselines", "retrieve"), _one_thread():
        results = retrieve(last, index, run_dir=out, progress=True)
    with _timed(times, "5/5 report", "report"):
        report = write_report([out], out / "report.html")
    totals = {f"total_{kind}": sum(t for key, t in times.items() if key.endswith(kind)) for kind in ("time_s", "cpu_s")}
    return {**results, **times, **totals, "run": str(out), "report": str(report)}


@contextmanager
def _one_thread() -> Iterator[None]:
    """Lets torch compute with one thread, while loading uses the other cores.

    More threads round sums in another order, which so small a run amplifies to what a seed is worth. With one thread
    the result of a seed depends on the processor's instruction set, and not on its number of cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _check_same_seed(out: Path, seed: int) -> None:
    recorded = out / "config.json"
    if recorded.is_file() and (before := load(recorded).run.seed) != seed:
        raise InputError(
            f"--seed: the quick start in {str(out)!r} has seed {before}, got {seed}; choose another --out, or "
            f"continue it with --seed {before}"
        )


def quickstart_config(index: Path, out: Path, seed: int) -> Config:
    """Returns the settings of quickstart.toml for this index, run folder and seed."""
    config = load(Path(__file__).with_name("quickstart.toml"))
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, index=str(index)),
        run=dataclasses.replace(config.run, out=str(out), seed=seed),
    )


@contextmanager
def _timed(times: dict[str, float], title: str, part: str) -> Iterator[None]:
    """Logs the title of a part before it runs, and stores its wall time and the CPU time of this process in seconds."""
    log.info("%s", title)
    start, cpu_start = time.perf_counter(), time.process_time()
    yield
    times[f"{part}_time_s"] = round(time.perf_counter() - start, 2)
    times[f"{part}_cpu_s"] = round(time.process_time() - cpu_start, 2)
