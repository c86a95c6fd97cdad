"""Checks of the machine: packages, optional parts, the operators, video codecs, memory and disk."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from cpr_fast.doctor.findings import Finding
from cpr_fast.errors import is_installed

PACKAGES = ("nvidia-dali-cuda130", "nvidia-dali-cuda120", "nvidia-nvimgcodec-cu13", "av", "numpy", "pillow",
            "opencv-contrib-python-headless", "opencv-python-headless", "opencv-python", "simplejpeg", "lmdb",
            "msgpack", "tensorboard", "safetensors", "onnx")  # fmt: skip

# part -> (modules, what needs it, the command that installs it)
OPTIONAL: dict[str, tuple[tuple[str, ...], str, str]] = {
    "NVIDIA DALI": (("nvidia.dali",), "training and evaluation", "pip install nvidia-dali-cuda130"),
    "PyAV": (("av",), "every command that reads video files", "pip install av"),
    "OpenCV": (("cv2",), "colour and blur augmentation on the CPU", "pip install opencv-contrib-python-headless"),
    "LMDB": (("lmdb", "msgpack", "simplejpeg"), "videos as JPEG records (FILE.lmdb#NAME)",
             "pip install lmdb msgpack simplejpeg"),
    "safetensors": (("safetensors",), "stored features and `export`", "pip install safetensors"),
    "scikit-learn": (("sklearn",), "`probe` and `finetune`", "pip install scikit-learn"),
    "report": (("matplotlib", "jinja2"), "`report`", "pip install matplotlib jinja2"),
    "ONNX": (("onnx", "onnxscript"), "`export` to ONNX", "pip install onnx onnxscript"),
    "TensorBoard": (("tensorboard",), "run.tensorboard = true", "pip install tensorboard"),
    "Weights & Biases": (("wandb",), "run.wandb = true", "pip install wandb"),
    "trackio": (("trackio",), "run.trackio = true", "pip install trackio"),
    "NVIDIA Apex": (("apex",), "optim.name = \"apex_lamb\" or \"apex_novograd\"",
                    "build it from https://github.com/NVIDIA/apex; the package of this name on PyPI is another one"),
}  # fmt: skip
NEEDED_BY_MOST = ("NVIDIA DALI", "PyAV", "LMDB", "safetensors")  # a missing one is an error


def packages() -> dict[str, str]:
    """Returns the installed ones of `PACKAGES` with their versions."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def optional_parts(findings: list[Finding]) -> list[dict[str, Any]]:
    """Returns a row per optional part: "part", "installed", "needed_for", "install". The modules are not imported."""
    rows = []
    for part, (modules, needed_for, install) in OPTIONAL.items():
        missing = [module for module in modules if not is_installed(module)]
        rows.append({"part": part, "installed": not missing, "needed_for": needed_for, "install": install})
        if missing and part in NEEDED_BY_MOST:
            text = f"{part} is not installed (no module {', '.join(missing)}); it is needed for {needed_for}"
            findings.append(Finding("error", text, install, "fails"))
    absent = [row for row in rows if not row["installed"] and row["part"] not in NEEDED_BY_MOST]
    if absent:
        text = "optional parts that are not installed: " + "; ".join(f"{r['part']} ({r['needed_for']})" for r in absent)
        advice = "only if you need them: " + "; ".join(f"{row['part']}: {row['install']}" for row in absent)
        findings.append(Finding("ok", text, advice))
    return rows


def kernels(device: torch.device, findings: list[Finding]) -> dict[str, Any]:
    """Returns what this build contains, after running each operator once on a small problem on `device`."""
    built: dict[str, Any] = {}
    try:
        from cpr_fast import _host
        from cpr_fast.ops import cascade_select, mil_nce

        info = _host.build_info()
        variants = info["cpu_variants"].split(",")
        built = {"cpu_variant": info["cpu_variant"], "cpu_variants": variants, "compiler": info["compiler"],
                 "cuda_architectures": [name for name in info["cuda_architectures"].split(",") if name],
                 # None if the library of the checkout was built from older sources.
                 **{key: info.get(key) for key in ("cuda_version", "cuda_oldest_driver")}}  # fmt: skip
        features = torch.nn.functional.normalize(torch.rand(2, 8, 16), dim=-1).to(device)
        positives, _ = cascade_select(features, features, views=[1, 0, 1], keep=[4, 3, 2])
        loss = mil_nce(features[0], features[0], features[0], positives)
        if not torch.isfinite(loss):
            raise RuntimeError(f"the loss of a small problem is {loss.item()}")
        variant = info["cpu_variant"]
        if variant in info.get("cpu_variants_emulated", "").split(","):
            variant += " (emulated for tests: not its speed)"
        findings.append(Finding("ok", f"the operators run on {device.type}, CPU variant {variant}"))
    except (ImportError, RuntimeError, OSError) as error:
        advice = "build them: python setup.py build_ext"
        findings.append(Finding("error", f"the operators do not run: {error}", advice, "fails"))
    if torch.cuda.is_available() and not built.get("cuda_architectures"):
        advice = "build again where nvcc is installed, with CPR_FAST_CUDA=ON"
        text = "this machine has a GPU, but this build of cpr_fast has no CUDA kernels"
        findings.append(Finding("error", text, advice, "fails"))
    if torch.version.cuda is not None and built.get("cuda_architectures"):
        driver(findings)
    return built


def driver(findings: list[Finding]) -> None:
    """Checks that the NVIDIA driver, if there is one, is new enough for the CUDA kernels."""
    from cpr_fast.ops.binding.library import driver_error

    if problem := driver_error():
        text, _, advice = problem.partition(": ")
        findings.append(Finding("error", f"the CUDA kernels cannot run: {text}", advice, "fails"))


def codecs(device: torch.device, findings: list[Finding]) -> list[dict[str, Any]]:
    """Returns a row per codec, after encoding and decoding a few frames; empty if DALI or PyAV is missing."""
    try:
        from cpr_fast.doctor.parity import CODECS, check_codec
    except ImportError as error:
        advice = "see the optional parts that are not installed"
        findings.append(Finding("error", f"videos cannot be decoded here: {error}", advice, "fails"))
        return []
    with tempfile.TemporaryDirectory() as folder:
        rows = [check_codec(codec, Path(folder), device) for codec in CODECS]
    exact = [row["codec"] for row in rows if row["pyav"] == "exact"]
    tried = [row for row in rows if not row["pyav"].startswith("not tried")]
    broken = [f"{row['codec']} ({row['pyav']})" for row in tried if row["pyav"] != "exact"]
    if exact:
        findings.append(Finding("ok", f"PyAV decodes every frame of these codecs correctly: {', '.join(exact)}"))
    if broken:
        text = f"PyAV does not decode these codecs correctly: {', '.join(broken)}"
        findings.append(Finding("error", text, "pip install --upgrade av", "fails"))
    return rows


def machine(folder: Path, findings: list[Finding]) -> dict[str, Any]:
    """Returns processor, memory, free shared memory, and the free disk space of `folder`."""
    shm, disk = free_gib(Path("/dev/shm")), free_gib(folder)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    if shm is None or shm < 0.25:
        free = "is missing" if shm is None else f"has {shm:.2f} GiB free"
        advice = "training on several GPUs (NCCL) needs shared memory; in Docker: docker run --shm-size=2g"
        findings.append(Finding("warning", f"/dev/shm {free}", advice, "capacity"))
    if disk is not None and disk < 2:
        advice = "free some space: checkpoints and stored flow need it"
        findings.append(Finding("warning", f"the disk of {folder} has {disk:.1f} GiB free", advice, "capacity"))
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "shm_free_gib": shm,
        "disk_free_gib": disk,
    }


def free_gib(path: Path) -> float | None:
    """Returns the free space of the disk that holds `path`; None if it cannot be determined."""
    try:
        return round(shutil.disk_usage(path).free / 2**30, 2)
    except OSError:
        return None
