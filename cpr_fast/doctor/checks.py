"""Runs every check of `cpr-fast doctor` and collects its findings."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cpr_fast.config import Config
from cpr_fast.doctor.findings import Finding, ordered
from cpr_fast.doctor.machine import codecs, kernels, machine, optional_parts, packages
from cpr_fast.errors import InputError
from cpr_fast.runtime.metrics import environment
from cpr_fast.runtime.progress import announce, duration
from cpr_fast.wording import counted

if TYPE_CHECKING:
    from cpr_fast.data.index.index import Index


def doctor(
    index: Path | None,
    config: Config | None,
    *,
    device: torch.device,
    seconds: float,
    store: Path | None = None,
    judged: str = "",
    findings: Iterable[Finding] = (),
) -> dict[str, Any]:
    """Checks the machine and, if an index is given, its data, and measures where the time of a training step goes.

    Problems of an index never raise an exception: each of them is reported as a finding.

    Args:
        index: an index (CSV), or None.
        config: the settings that the data are checked against, and that the step is measured with; None if there are
            none for this index, so that neither is done.
        device: where the operators and the step run.
        seconds: time for measuring a step; 0 skips the measurement.
        store: a store of features to check, on its own or against the videos of the index; or None.
        judged: a sentence that says where `config` is from, for the user.
        findings: what was found earlier; it is listed with the other findings.
    Returns:
        "judged", "environment", "optional", "kernels", "codecs", "machine", "data", "estimates", "breakdown", "store"
        and "findings". "findings" is a list of {"level": "error" | "warning" | "ok", "text", "advice", "effect"}, the
        ones to act on first at its start. "data", "estimates" and "breakdown" are None without an index, or if the
        index has no usable video.
    """
    findings = list(findings)
    announce("Checking the kernels, and decoding a test video of every codec")
    folder = index.parent if index is not None and index.parent.is_dir() else Path.cwd()
    result: dict[str, Any] = {
        "judged": judged,
        "environment": environment(device) | {"packages": packages()},
        "optional": optional_parts(findings),
        "kernels": kernels(device, findings),
        "codecs": codecs(device, findings),
        "machine": machine(folder, findings),
        "data": None,
        "estimates": None,
        "breakdown": None,
        "store": None,
    }
    if index is not None:
        try:
            result |= _check_data(index, config, device, seconds if result["codecs"] else 0, findings)
        except ImportError as error:
            findings.append(Finding("error", f"the index cannot be checked: {error}", "install it", "fails"))
    if store is not None:
        result["store"] = _check_store(store, index, findings)
    return result | {"findings": [asdict(finding) for finding in ordered(findings)]}


def _check_store(store: Path, index: Path | None, findings: list[Finding]) -> dict[str, Any] | None:
    from cpr_fast.data.index.index import Index
    from cpr_fast.doctor.stores.check import check_store

    announce(f"Reading the features of {store}")
    videos = None
    if index is not None:
        with suppress(InputError, OSError, ValueError):  # which the checks of the index report
            videos = Index.load(index, require_flow=False, skipped=[])
    return check_store(store, videos, findings)


def _check_data(
    index: Path, config: Config | None, device: torch.device, seconds: float, findings: list[Finding]
) -> dict[str, Any]:
    """Returns "data", "estimates" and "breakdown" of an index; the last two only if it can be trained on."""
    from cpr_fast.doctor.data import check_index, decoded_from_start, load_index, training_part
    from cpr_fast.doctor.estimates import estimates

    videos = load_index(index, findings)
    if videos is None:
        return {}
    announce(f"Checking {counted(len(videos), 'video')}")
    data = check_index(index, videos, config, findings)
    train = training_part(videos, config, findings)
    if config is not None and not _can_be_built(config, findings):
        return {"data": data}
    row = None
    if train is not None and config is not None and seconds > 0 and data["decodable"]:
        row = _breakdown(train, config, device, seconds, findings)
    findings += decoded_from_start(index, videos, data, row)
    if train is None or config is None:
        return {"data": data}
    expected = estimates(index, videos, train, config, row, findings) if data["decodable"] else None
    return {"data": data, "estimates": expected, "breakdown": row}


def _can_be_built(config: Config, findings: list[Finding]) -> bool:
    """Returns whether the network of a config can be built; a network of the user that cannot is an error."""
    if config.model.factory is None:
        return True
    from cpr_fast.models import build_encoder

    announce("Building the network that model.arch names")
    try:
        build_encoder(config.model, config.data)
    except InputError as error:
        findings.append(
            Finding("error", str(error), "correct the network, or the settings of [model] and [data]", "fails")
        )
        return False
    return True


def _breakdown(
    train: Index, config: Config, device: torch.device, seconds: float, findings: list[Finding]
) -> dict[str, Any] | None:
    from cpr_fast.doctor.bottleneck import breakdown
    from cpr_fast.doctor.data import views_read

    has_flow = config.data.flow != "stored" or all(video.flow_path for video in train)
    views = tuple(view for view in views_read(config) if view != "flow" or has_flow) or ("rgb",)
    announce(f"Measuring the time of a training step for about {duration(seconds)}, longer on a busy machine")
    try:
        row = breakdown(train, config, views, device=device, seconds=seconds)
    except Exception as error:  # any error is reported together with the other findings
        text = f"the time of a training step could not be measured: {type(error).__name__}: {error}"
        findings.append(Finding("warning", text, "--seconds 0 leaves this measurement out", "time"))
        return None
    findings.append(_verdict(row))
    return row


def _verdict(row: dict[str, Any]) -> Finding:
    stages = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in row["stage_s_per_step"].items())
    text = (f"a training step of {counted(row['batch_size'], 'video')}: {stages}; the loader alone delivers a batch "
            f"every {row['loader_s_per_step']:.3g} s. The slowest stage is {row['bottleneck']!r}")  # fmt: skip
    if busy := row["other_programs"]:
        text += f". {busy}"
    return Finding("ok" if row["bottleneck"] == "step" else "warning", text, row["advice"], "time")
