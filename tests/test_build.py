"""What is built is what was asked for, loads everywhere it should, and draws the published random numbers."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import cpr_fast
from cpr_fast import _host
from cpr_fast.ops import _library

ROOT = Path(__file__).resolve().parent.parent
OPS = ("cascade_select", "mil_nce", "mil_nce_grad_memory", "tvl1_flow")


def test_cuda_kernels_are_registered_when_built():
    built = _host.build_info()["cuda_architectures"]
    for op in OPS[:3]:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"cpr_fast::{op}", "CUDA") == bool(built), op
    if os.environ.get("CPR_FAST_CUDA") == "ON":
        assert built, "CPR_FAST_CUDA=ON, but the library has no CUDA kernels"


def test_every_operator_has_a_cpu_kernel():
    for op in OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"cpr_fast::{op}", "CPU"), op


def test_build_info(kernel_library):
    info = _host.build_info()
    assert info["version"] == cpr_fast.__version__
    assert info["cpu_variants"].split(",")[-1] == "portable"
    assert info["cpu_variants"].encode() == kernel_library.cpr_cpu_variants()
    assert info["cuda_architectures"].encode() == kernel_library.cpr_cuda_architectures()


def test_an_unknown_cpu_variant_is_refused(kernel_library):
    assert kernel_library.cpr_force_cpu_variant(b"sse9") != 0


def test_the_library_needs_no_cuda_and_no_python():
    """Only libtorch.so and the C++ runtime: that is what lets one file load under every torch >= 2.10."""
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf")
    dynamic = subprocess.run(["readelf", "-d", _library._PATH], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", dynamic))
    assert needed <= {
        "libtorch.so",
        "libstdc++.so.6",
        "libm.so.6",
        "libgcc_s.so.1",
        "libc.so.6",
        "ld-linux-x86-64.so.2",
    }
    assert not re.search(r"R(UN)?PATH", dynamic)


def test_variant_objects_share_no_code():
    """A function emitted out of line in a variant's object could be picked for every variant by the linker."""
    objects = sorted((ROOT / "build").glob("cmake-*/CMakeFiles/cpu_*.dir/csrc/cpu/*.o"))
    if not objects or shutil.which("nm") is None:
        pytest.skip("needs the build tree and nm")
    for path in objects:
        symbols = subprocess.run(
            ["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True
        ).stdout
        shared = [line for line in symbols.splitlines() if re.match(r"\S+ W ", line)]
        assert not shared, f"{path.name}: {shared}"


def test_ops_import_needs_torch_alone():
    code = (
        "import sys, cpr_fast.ops; "
        "extra = {'nvidia', 'av', 'tyro', 'rich', 'matplotlib', 'jinja2'} & set(sys.modules); assert not extra, extra"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_philox_known_answers():
    """The vectors published with Random123 for philox4x32-10."""
    ones = 0xFFFFFFFF
    cases = [
        (0, [0, 0, 0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (2**64 - 1, [ones] * 4, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            0x299F31D0A4093822,
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ]
    for seed, counter, expected in cases:
        assert _host.philox(seed, np.array([counter], np.uint32)).tolist() == [expected]


def test_uniforms_are_a_function_of_seed_and_stream():
    streams = np.arange(3000, dtype=np.uint64).reshape(-1, 3)
    draws = _host.philox_uniform(7, streams, blocks=3)
    assert draws.shape == (1000, 12) and draws.min() >= 0 and draws.max() < 1
    assert abs(draws.mean() - 0.5) < 0.01 and abs(draws.var() - 1 / 12) < 0.005
    np.testing.assert_array_equal(_host.philox_uniform(7, streams[::-1])[::-1], draws[:, :4])
    assert not np.array_equal(_host.philox_uniform(8, streams), draws[:, :4])
    assert len(np.unique(draws)) > 0.99 * draws.size
    assert _host.philox_uniform(7, streams[:0]).shape == (0, 4)


@pytest.mark.parametrize(
    ("streams", "blocks", "message"),
    [
        (np.zeros((2, 4), np.uint64), 1, r"streams: expected shape \[N, 3\], got \[2, 4\]"),
        (np.zeros(3, np.uint64), 1, r"streams: .*\[3\]"),
        (np.full((1, 3), 2**32, np.uint64), 1, "streams: .*2\\*\\*32"),
        (np.zeros((2, 3), np.uint64), 0, "blocks: .*0"),
    ],
)
def test_philox_names_bad_arguments(streams, blocks, message):
    with pytest.raises(ValueError, match=message):
        _host.philox_uniform(0, streams, blocks)
