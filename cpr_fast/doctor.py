"""`cpr-fast doctor`: what works on this machine, what is wrong with the data, where the time of a step goes."""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from . import _host
from .config import Config
from .data.build import SHORT, report_path
from .data.index import Index, IndexFileError
from .data.layouts import HMDB51_CLASSES
from .data.media import container, is_record, read_frames
from .data.video import VideoError, slice_packets
from .metrics import environment

PACKAGES = ("nvidia-dali-cuda130", "nvidia-dali-cuda120", "nvidia-nvimgcodec-cu13", "av", "numpy", "pillow",
            "opencv-contrib-python-headless", "opencv-python-headless", "opencv-python", "simplejpeg", "lmdb",
            "msgpack", "tensorboard", "safetensors", "onnx")  # fmt: skip
SAMPLE, SAMPLE_S = 12, 10.0  # at least so many videos are decoded to look for damage, more within these seconds


@dataclass(frozen=True)
class Finding:
    level: Literal["ok", "warning", "error"]
    text: str
    advice: str = ""


def doctor(index: Path | None, config: Config, *, device: torch.device, seconds: float) -> dict[str, Any]:
    """Everything that can be said: {"environment", "kernels", "codecs", "machine", "data", "breakdown", "findings"}.

    Every finding has a "level", a "text" and an "advice"; "data" and "breakdown" are None without an index or where
    it gives no video.
    """
    findings: list[Finding] = []
    result: dict[str, Any] = {
        "environment": environment(device) | {"packages": _packages()},
        "kernels": _kernels(device, findings),
        "codecs": _codecs(device, findings),
        "machine": _machine(index, findings),
        "data": None,
        "breakdown": None,
    }
    videos = None if index is None else _load(index, findings)
    if videos is not None:
        result["data"] = _data(index, videos, config.data.flow, findings)
        train = _training_part(videos, config, findings)
        has_flow = config.data.flow == "on_the_fly" or all(video.flow_path for video in train)
        views = ("rgb", "flow") if has_flow else ("rgb",)
        if seconds > 0 and result["data"]["decodable"] and result["codecs"]:
            from .bottleneck import breakdown

            result["breakdown"] = breakdown(train, config, views, device=device, seconds=seconds)
            findings.append(_verdict(result["breakdown"]))
    return result | {"findings": [asdict(finding) for finding in findings]}


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _kernels(device: torch.device, findings: list[Finding]) -> dict[str, Any]:
    """What this build holds, and whether it runs: each operator once on a small problem."""
    info = _host.build_info()
    variants = info["cpu_variants"].split(",")
    kernels = {"cpu_variant": info["cpu_variant"], "cpu_variants": variants, "compiler": info["compiler"],
               "cuda_architectures": [name for name in info["cuda_architectures"].split(",") if name]}  # fmt: skip
    try:
        from .ops import cascade_select, mil_nce

        features = torch.nn.functional.normalize(torch.rand(2, 8, 16), dim=-1).to(device)
        positives, _ = cascade_select(features, features, views=[1, 0, 1], keep=[4, 3, 2])
        loss = mil_nce(features[0], features[0], features[0], positives)
        assert torch.isfinite(loss)
        findings.append(Finding("ok", f"the kernels run on {device.type}, CPU variant {info['cpu_variant']}"))
    except (ImportError, RuntimeError, AssertionError, OSError) as error:
        findings.append(Finding("error", f"the kernels do not run: {error}", "build them: python setup.py build_ext"))
    if torch.cuda.is_available() and not kernels["cuda_architectures"]:
        findings.append(Finding("error", "a GPU is here, but this build has no CUDA kernels",
                                "build again where nvcc is, with CPR_FAST_CUDA=ON"))  # fmt: skip
    return kernels


def _codecs(device: torch.device, findings: list[Finding]) -> list[dict[str, Any]]:
    """Every codec, by encoding a few frames and decoding them again; none without DALI."""
    try:
        from .data.parity import CODECS, check_codec
    except ImportError as error:
        findings.append(Finding("error", f"no video pipeline: {error}"))
        return []
    with tempfile.TemporaryDirectory() as folder:
        rows = [check_codec(codec, Path(folder), device) for codec in CODECS]
    exact = [row["codec"] for row in rows if row["pyav"] == "exact"]
    broken = [f"{row['codec']} ({row['pyav']})" for row in rows if row["pyav"] not in ("exact",) and
              not row["pyav"].startswith("not tried")]  # fmt: skip
    findings.append(Finding("ok", f"frame-exact through PyAV: {', '.join(exact)}"))
    if broken:
        findings.append(Finding("error", f"PyAV does not decode {', '.join(broken)}", "pip install --upgrade av"))
    return rows


def _machine(index: Path | None, findings: list[Finding]) -> dict[str, Any]:
    shm = _free_gib(Path("/dev/shm"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    disk = _free_gib(index.parent if index is not None and index.parent.exists() else Path.cwd())
    if shm is None or shm < 0.25:
        findings.append(Finding("warning", f"/dev/shm has {shm or 0:.2f} GiB free",
                                "NCCL of several GPUs needs some: docker run --shm-size=2g"))  # fmt: skip
    if disk is not None and disk < 2:
        findings.append(Finding("warning", f"the disk has {disk:.1f} GiB free", "checkpoints and flow need room"))
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "shm_free_gib": shm,
        "disk_free_gib": disk,
    }


def _free_gib(path: Path) -> float | None:
    return round(shutil.disk_usage(path).free / 2**30, 2) if path.exists() else None


def _load(index: Path, findings: list[Finding]) -> Index | None:
    """The rows of the index that hold, or None; whatever does not is an error."""
    skipped: list[IndexFileError] = []
    try:
        videos = Index.load(index, require_flow=False, skipped=skipped)
    except IndexFileError as error:
        findings.append(Finding("error", str(error), "write the index anew: cpr-fast index"))
        return None
    if skipped:
        more = f", and {len(skipped) - 3} more" if len(skipped) > 3 else ""
        text = "; ".join(str(error) for error in skipped[:3])
        findings.append(Finding("error", f"{len(skipped)} rows of the index are bad: {text}{more}",
                                "write the index anew: cpr-fast index"))  # fmt: skip
    return videos if len(videos) else None


def _data(index: Path, videos: Index, flow: str, findings: list[Finding]) -> dict[str, Any]:
    """What the index says and a sample of its videos shows."""
    sizes = Counter(f"{video.width}x{video.height}" for video in videos)
    short = sum(video.num_frames <= SHORT for video in videos)
    without_flow = sum(video.flow_path is None for video in videos)
    siblings = Counter(video.source for video in videos)
    sampled, damaged, whole = _sample(videos)
    facts = {
        "videos": len(videos),
        "splits": dict(Counter(video.split for video in videos)),
        "classes": len(videos.classes),
        "class_order": _class_order(videos.classes),
        "unlabelled": int((videos.labels < 0).sum()),
        "sources": len(siblings),
        "videos_with_siblings": sum(count for count in siblings.values() if count > 1),
        "sizes": len(sizes),
        "short": short,
        "without_flow": without_flow,
        "sampled": sampled,
        "damaged": damaged,
        "decodable": len(damaged) < sampled,
        "disk_free_gib": _free_gib(container(videos[0].path).parent),
    }
    if damaged:
        text = "; ".join(f"{row['path']}: {row['reason']}" for row in damaged[:3])
        findings.append(Finding("error", f"{len(damaged)} of {facts['sampled']} sampled videos are damaged: {text}",
                                "cpr-fast index --verify lists them all and leaves them out"))  # fmt: skip
    else:
        findings.append(Finding("ok", f"{facts['sampled']} sampled videos decode to their last frame"))
    if without_flow and flow == "stored":
        findings.append(Finding("warning", f"{without_flow} of {len(videos)} videos have no flow",
                                f"cpr-fast flow {index} --out FLOW, data.flow = \"on_the_fly\", or the view "
                                "\"residual\""))  # fmt: skip
    if short:
        findings.append(Finding("warning", f"{short} videos have {SHORT} frames or fewer; CoCLR drops them",
                                f"cpr-fast index --min-frames {SHORT + 1}"))  # fmt: skip
    if len(sizes) > 100:
        findings.append(Finding("warning", f"the videos have {len(sizes)} sizes: a hardware decoder caches 100",
                                "cpr-fast index --transcode"))  # fmt: skip
    if whole:
        findings.append(Finding("warning", f"{whole} of {facts['sampled']} sampled videos are decoded from their start "
                                "for every clip (AVI, or one key frame)", "cpr-fast index --transcode"))  # fmt: skip
    findings += _report(index)
    return facts


def _sample(videos: Index) -> tuple[int, list[dict[str, str]], int]:
    """How many videos, drawn from the index, were looked at; those whose first, middle or last frame does not decode;
    and how many are sliced whole."""
    sampled, damaged, whole = 0, [], 0
    end = time.perf_counter() + SAMPLE_S
    for position in np.random.default_rng(0).permutation(len(videos)):
        if sampled >= SAMPLE and time.perf_counter() > end:
            break
        sampled += 1
        video = videos[int(position)]
        parts = [(video.path, "rgb", video.num_frames)]
        parts += [(video.flow_path, "flow", video.num_frames - 1)] if video.flow_path else []
        try:
            for path, view, frames in parts:
                read_frames(path, np.unique([0, frames // 2, frames - 1]), view, frames)
            if not is_record(video.path) and video.num_frames > 64:
                end = np.arange(video.num_frames - 8, video.num_frames)
                packets, _ = slice_packets(video.path, end, video.num_frames)
                whole += len(packets) > 0.7 * video.path.stat().st_size
        except VideoError as error:
            damaged.append({"path": str(error.path), "reason": error.reason})
    return sampled, damaged, whole


def _class_order(classes: list[str]) -> str:
    """What the numbers of the labels follow: checkpoints with a classifier, and their confusion, depend on it."""
    official = [name for name in HMDB51_CLASSES if name in classes]
    if len(classes) > 1 and set(classes) <= set(HMDB51_CLASSES):
        if classes == official:
            return "HMDB51 as in CoCLR and CPR"
        return "HMDB51, alphabetical as in IIC" if classes == sorted(classes) else "HMDB51, neither order"
    return "alphabetical" if classes == sorted(classes) else "of the lists"


def _report(index: Path) -> list[Finding]:
    """What `cpr-fast index` found, if its report lies beside the index."""
    try:
        counts = json.loads(report_path(index).read_text())["counts"]
    except (OSError, ValueError, KeyError):
        return []
    if not counts:
        return []
    named = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    return [Finding("warning", f"the index report names {named}", f"see {report_path(index)}")]


def _training_part(videos: Index, config: Config, findings: list[Finding]) -> Index:
    try:
        train = videos.select(config.data.split)
    except IndexFileError:
        findings.append(Finding("warning", f"the index has no split {config.data.split!r}", "set data.split"))
        train = videos
    if len(train) < config.data.batch_size:
        findings.append(Finding("warning", f"{len(train)} training videos are fewer than data.batch_size "
                                f"{config.data.batch_size}", "lower data.batch_size"))  # fmt: skip
    return train


def _verdict(row: dict[str, Any]) -> Finding:
    stages = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in row["stage_s_per_step"].items())
    text = (f"a step of {row['batch_size']} videos: {stages}; the loader alone gives one every "
            f"{row['loader_s_per_step']:.3g} s. Slowest: {row['bottleneck']}")  # fmt: skip
    return Finding("ok" if row["bottleneck"] == "step" else "warning", text, row["advice"])


def show(result: dict[str, Any]) -> None:
    """The result as tables on stdout."""
    from rich.console import Console
    from rich.table import Table

    console, colours = Console(), {"ok": "green", "warning": "yellow", "error": "red"}
    about = result["environment"]
    packages = ", ".join(f"{name} {number}" for name, number in (about["versions"] | about["packages"]).items())
    machine = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    kernels = result["kernels"]
    cuda = ", ".join(kernels["cuda_architectures"]) or "none"
    for line in (packages, f"{about['device']}; {machine}", f"kernels: {kernels['cpu_variant']}, CUDA {cuda}"):
        console.print(line, highlight=False)
    codecs = Table("codec", "PyAV", "DALI")
    for row in result["codecs"]:
        codecs.add_row(*row.values())
    console.print(codecs)
    if result["data"]:
        console.print_json(data=result["data"])
    if result["breakdown"]:
        stages = Table("stage", "s per step")
        for stage, value in result["breakdown"]["stage_s_per_step"].items():
            stages.add_row(stage, f"{value:.4g}")
        console.print(stages)
    for finding in result["findings"]:
        advice = f" -> {finding['advice']}" if finding["advice"] else ""
        console.print(f"[{colours[finding['level']]}]{finding['level']:8}[/] ", end="")
        console.print(f"{finding['text']}{advice}", highlight=False, markup=False)
