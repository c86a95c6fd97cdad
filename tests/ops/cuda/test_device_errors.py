"""What a user reads whose GPU or driver cannot run the CUDA kernels: what it is, what was built, what to install."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
from support.flow_references import DEFAULTS, SHORT, moving_texture
from support.operator_references import loss_inputs, normal

from cpr_fast.doctor import machine
from cpr_fast.ops.binding import library as _library

CALLS = {
    "cascade_select": lambda device: device.cascade_select(normal(2, 2, 8), normal(2, 601, 8), [0, 1], [600, 590]),
    "streamed": lambda device: device.cascade_select(normal(2, 2, 8), normal(2, 601, 8), [0, 1], [600, 590]),
    "mil_nce": lambda device: device.mil_nce(**loss_inputs(3, 70, 12, 3)),
    "grad_memory": lambda device: device.mil_nce(**loss_inputs(3, 70, 12, 3), forward=False),
    "tvl1_flow": lambda device: device.tvl1_flow(moving_texture(2, 17, 20, seed=1)[None], DEFAULTS | SHORT),
}
INSUFFICIENT_DRIVER, INVALID_FUNCTION, NO_IMAGE, UNSUPPORTED_PTX, OTHER = 35, 98, 209, 222, 719


@pytest.fixture
def refusing(emulated, request):
    """The emulated device; it refuses kernels after emulated.refuse(...)."""
    yield emulated
    emulated.refuse()
    emulated.resize()


def message(device, call: str) -> str:
    if call == "streamed":
        device.resize(shared_limit=0, cache_size=0)
    with pytest.raises(RuntimeError) as raised:
        CALLS[call](device)
    return str(raised.value)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("error", [NO_IMAGE, INVALID_FUNCTION, UNSUPPORTED_PTX])
def test_an_unsupported_gpu_is_named_with_what_was_built(refusing, call, error):
    refusing.refuse(capability=110, error=error)
    text = message(refusing, call)
    assert "'Emulated GPU' has compute capability 11.0" in text
    assert "80-real,90a-real" in text and text.endswith('TORCH_CUDA_ARCH_LIST="11.0"')


@pytest.mark.parametrize("call", CALLS)
def test_a_gpu_older_than_the_kernels_is_not_sent_to_a_build_that_fails(refusing, call):
    refusing.refuse(capability=75, error=NO_IMAGE)
    text = message(refusing, call)
    assert "compute capability 7.5" in text and "8.0 or newer" in text and "TORCH_CUDA_ARCH_LIST" not in text


@pytest.mark.parametrize("call", CALLS)
def test_an_old_driver_is_reported_by_every_operator(refusing, call):
    refusing.refuse(error=INSUFFICIENT_DRIVER)
    assert message(refusing, call) == "the driver is too old"  # the text of the emulated build


def test_other_errors_keep_the_text_of_cuda(refusing):
    refusing.refuse(error=OTHER)
    assert message(refusing, "mil_nce") == "invalid configuration argument"  # what the emulation says of every error


@pytest.fixture
def driver_message(tmp_path):
    """Returns what the library says about a driver that supports a version of CUDA (12040: 12.4); None: no driver."""
    if not _library._library.cpr_cuda_oldest_driver():
        pytest.skip("needs a build with CUDA kernels")

    def ask(version: int | None) -> str | None:
        environment = {}
        if version is not None:
            source = tmp_path / "driver.c"
            source.write_text(f"int cuDriverGetVersion(int* version) {{ *version = {version}; return 0; }}\n")
            subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", source], check=True)
            environment = {"LD_LIBRARY_PATH": str(tmp_path)}
        program = (
            f"import ctypes, torch; call = ctypes.CDLL({str(_library.PATH)!r}).cpr_cuda_driver_error\n"
            "call.restype = ctypes.c_char_p; message = call(); print(message.decode() if message else '')"
        )
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], env=environment, capture_output=True,
                              text=True, check=True)  # fmt: skip
        return done.stdout.strip() or None

    return ask


def test_an_old_driver_is_told_what_to_install(driver_message):
    library = _library._library
    library.cpr_cuda_version.restype = ctypes.c_char_p
    built = library.cpr_cuda_version().decode()
    major = int(built.partition(".")[0])
    text = driver_message(1000 * (major - 1) + 40)
    assert f"supports CUDA {major - 1}.4" in text and f"built with CUDA {built}" in text
    assert (
        f"install driver {library.cpr_cuda_oldest_driver()} or newer" in text
        and f"CUDA {major - 1} (CUDA_HOME)" in text
    )
    for enough in (None, 1000 * major, 1000 * major + 90, 1000 * (major + 1)):  # minor versions are compatible
        assert driver_message(enough) is None


def test_doctor_reports_an_old_driver(monkeypatch):
    monkeypatch.setattr(_library, "driver_error", lambda: "the driver supports CUDA 12.4: install driver 580 or newer")
    findings = []
    machine.driver(findings)
    (found,) = findings
    assert found.level == "error" and found.text.endswith("supports CUDA 12.4")
    assert found.advice == "install driver 580 or newer"


def test_importing_warns_of_an_old_driver_only_where_torch_uses_it():
    program = (
        "import ctypes, sys, torch, warnings\n"
        "torch.version.cuda = sys.argv[1] or None\n"
        "class Old(ctypes.CDLL):\n"
        "    def __getattr__(self, name):\n"
        "        if name != 'cpr_cuda_driver_error':\n"
        "            return super().__getattr__(name)\n"
        "        return type('Call', (), {'__call__': lambda self: b'an old driver'})()\n"
        "torch.ops.load_library  # loaded before ctypes is replaced\n"
        "ctypes.CDLL = Old\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import cpr_fast.ops\n"
        "print([str(w.message) for w in caught if 'cpr_fast' in str(w.message)])"
    )
    printed = [
        subprocess.run([sys.executable, "-c", program, version], capture_output=True, text=True, check=True).stdout
        for version in ("12.6", "")
    ]
    assert "an old driver" in printed[0] and printed[1].strip() == "[]"
