"""The emulated device with a sanitizer: every load, store, atomic, asynchronous copy and barrier is checked.

GCC instruments the kernels as for its thread sanitizer; `sanitizer/` replaces the library behind that. All tensors of a
call lie in an arena, 1 GiB or more apart, and workspaces and outputs start uninitialised. A call fails with the list of
reports: races within and between blocks, accesses out of bounds, uninitialised, misaligned or of a copy under way,
32-bit overflow of signed indices, a wrong stream, device or attribute, and outputs that were never written.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from support.cuda_emulation.compile import build
from support.cuda_emulation.device import Device

# What is read although it was never written, without consequence: iterate_tile computes pixels beyond the image and the
# tile from whatever shared memory holds, and never uses them. The calls run with two fillings of shared memory.
_HARMLESS = {("uninitialised shared memory", "tvl1_flow/tile.cuh")}
_STREAM = 0x5EED


class SanitizedDevice(Device):
    def __init__(self, library: Path):
        super().__init__(library)
        self._path = library
        self._library.sanitizer_allocate.restype = ctypes.c_void_p
        self._library.sanitizer_unwritten.restype = ctypes.c_size_t
        self._library.sanitizer_reports.restype = ctypes.c_char_p
        self.stream = _STREAM
        self.offset = 0  # elements that inputs start off a multiple of 256 bytes
        self.workspace_offset = 0  # bytes that the workspace starts off a multiple of 256
        self.poison = 0xFF  # the byte that uninitialised memory consists of
        self.sparse = False  # outputs and workspace are zero and initialised, for calls of which only edges run
        self._reset()

    @classmethod
    def or_skip(cls) -> SanitizedDevice:
        if shutil.which("g++") is None:
            pytest.skip("needs g++ to compile the kernels for the host")
        probe = [
            "g++",
            "-fsanitize=thread",
            "--param",
            "tsan-distinguish-volatile=1",
            "-x",
            "c++",
            "-S",
            "-o",
            "-",
            "-",
        ]
        if subprocess.run(probe, input=b"int f(int* p) { return *p; }", capture_output=True).returncode != 0:
            pytest.skip("needs a g++ with -fsanitize=thread and tsan-distinguish-volatile (GCC 11 or later)")
        return cls(build(sanitize=True))

    def choose_blocks(self, chosen: str) -> None:
        """Runs only the `edges` (the first and the last two blocks) or the `last` block along each axis of a grid of
        more than 8, so that tensors can be of any size; their pages are zero until they are written. Or runs `all`."""
        self._library.emulation_choose_blocks(["all", "edges", "last"].index(chosen))
        self.sparse = chosen != "all"
        self._reset()

    def start_queue(self, first: int) -> None:
        """Makes the queue of frame pairs start at `first` in every call."""
        self._library.emulation_start_queue(first)

    def set_poison(self, byte: int) -> None:
        self.poison = byte
        self._library.emulation_set_poison(byte)

    def allocate(self, name: str, shape, dtype=torch.float32, initialised=True, offset=0) -> torch.Tensor:
        """Returns a zeroed tensor in the arena, which lasts until the end of the next call. Its pages are taken when
        they are first touched."""
        bytes_ = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        label = name.encode()
        self._names.append(label)
        address = self._library.sanitizer_allocate(
            ctypes.c_size_t(max(bytes_, 1)), ctypes.c_size_t(offset), int(initialised), label
        )
        if address is None:
            pytest.skip("the address space for the tensors of the sanitizer cannot be reserved")
        flat = torch.frombuffer((ctypes.c_uint8 * max(bytes_, 1)).from_address(address), dtype=torch.uint8)
        self._held.add(address)
        return flat[:bytes_].view(dtype).view(shape)

    def _reset(self) -> None:
        self._names, self._held = [], set()
        if self._library.sanitizer_reset(ctypes.c_void_p(self.stream)) != 0:
            pytest.skip("the address space for the tensors of the sanitizer cannot be reserved")

    def _input(self, name, tensor):
        if tensor is None or tensor.data_ptr() in self._held:
            return tensor
        return self.allocate(name, tensor.shape, tensor.dtype, offset=self.offset * tensor.dtype.itemsize).copy_(tensor)

    def _output(self, name, shape, value, dtype=torch.float32):
        made = self.allocate(name, shape, dtype, initialised=self.sparse)
        return made if self.sparse else made.fill_(value)

    def _workspace(self, bytes_):
        made = self.allocate("workspace", (bytes_,), torch.uint8, self.sparse, offset=self.workspace_offset)
        return made if self.sparse else made.fill_(self.poison)

    def _finish(self, workspace, *outputs):
        faults = self.reports()
        for output in () if self.sparse else outputs:
            address, bytes_ = ctypes.c_void_p(output.data_ptr()), ctypes.c_size_t(output.numel() * output.itemsize)
            if missing := self._library.sanitizer_unwritten(address, bytes_):
                faults.append(
                    f"unwritten: {missing} of {bytes_.value} bytes of an output of shape {list(output.shape)}"
                )
        assert not faults, "\n".join(["the sanitizer reports", *faults])

    def _run(self, *args, **kwargs):
        try:
            super()._run(*args, **kwargs)
        except RuntimeError as error:
            if faults := self.reports():
                raise AssertionError("\n".join([str(error), *faults])) from error
            raise

    def cascade_select(self, *args, **kwargs):
        return self._detached(super().cascade_select, args, kwargs)

    def mil_nce(self, *args, **kwargs):
        return self._detached(super().mil_nce, args, kwargs)

    def tvl1_flow(self, *args, **kwargs):
        return self._detached(super().tvl1_flow, args, kwargs)

    def _detached(self, call, args, kwargs):
        """Runs a call on a fresh arena and returns copies of its outputs; sparse outputs stay in the arena."""
        if not self.sparse:
            self._reset()
        self.reports()
        found = call(*args, **kwargs)
        if self.sparse:
            return found
        return {k: v.clone() for k, v in found.items()} if isinstance(found, dict) else tuple(t.clone() for t in found)

    def reports(self) -> list[str]:
        """Returns the reports since the last call, with the lines of the kernels they are about."""
        lines = [line.split("\t") for line in self._library.sanitizer_reports().decode().splitlines()]
        places = self._lines_of([int(offset, 16) for *_, offset in lines])
        faults = []
        for (kind, what, site, _), place in zip(lines, places, strict=True):
            if not any(kind == k and source in place for k, source in _HARMLESS):
                faults.append(f"{kind}: {what} ({site or place})")
        return faults

    def _lines_of(self, offsets: list[int]) -> list[str]:
        """Returns the line of the kernel that each offset in the library belongs to, and those it is inlined in."""
        if not offsets or shutil.which("addr2line") is None:
            return [f"{self._path} + {offset:#x}; addr2line would name the line" for offset in offsets]
        command = ["addr2line", "-a", "-i", "-e", str(self._path), *(hex(max(offset, 1) - 1) for offset in offsets)]
        answer = subprocess.run(command, capture_output=True, text=True).stdout
        places = []
        for _, *frames in (part.splitlines() for part in answer.split("0x")[1:]):
            kernels = [frame.split(" ")[0].partition("/cuda/")[2] for frame in frames if "/cuda/" in frame]
            others = [frame.split(" ")[0] for frame in frames if not frame.split(":")[0].endswith(".h")]
            places.append(" in ".join(kernels[:3] or others))
        return [place if offset else "in the host's part" for offset, place in zip(offsets, places, strict=True)]
