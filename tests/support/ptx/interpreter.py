"""The interpreter of PTX: loads text, runs its kernels, and says what each instruction did.

`parse/` reads PTX and `run/` executes it warp by warp, see machine.h there.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

from support.cuda_emulation.device import ORDERS
from support.ptx.build import build_interpreter

_POINTER = ctypes.c_void_p


class Count(NamedTuple):
    """What one instruction did: executions by warps, lanes, and `units`, which are sectors of 32 bytes of global
    memory, wavefronts of shared memory, or the times that the threads of a warp parted at a branch; `least`: the units
    that the same bytes need at least; `shared_units`, `shared_least`: the same of generic accesses that found shared
    memory."""

    function: str
    opcode: str
    kind: str
    file: str
    line: int
    executed: int
    lanes: int
    units: int
    least: int
    shared_units: int = 0
    shared_least: int = 0


class Launch(NamedTuple):
    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int


class Interpreter:
    """The compiled interpreter. All instances share its machines, one for each text that was loaded."""

    def __init__(self):
        self.path = build_interpreter()
        self._library = ctypes.CDLL(str(self.path), mode=ctypes.RTLD_GLOBAL)
        for name in ("ptx_error", "ptx_entries", "ptx_counts", "ptx_launches"):
            getattr(self._library, name).restype = ctypes.c_char_p
        self._library.ptx_launch.restype = ctypes.c_long

    def load(self, text: bytes) -> int:
        """Returns the number of the machine for a text of PTX."""
        machine = self._library.ptx_load(text)
        if machine < 0:
            raise RuntimeError(self.error())
        return machine

    def error(self) -> str:
        return self._library.ptx_error().decode()

    def entries(self, machine: int) -> list[str]:
        return self._library.ptx_entries(machine).decode().split()

    def bind(self, host_function: int, machine: int, entry: str) -> None:
        """Makes launches of the host function run this entry from now on."""
        self._library.ptx_bind(_POINTER(host_function), machine, entry.encode())

    def launch(self, host_function: int, grid, threads: int, shared_bytes: int, arguments, cooperative=False) -> None:
        """Runs the entry with arguments that are ctypes values."""
        along = (ctypes.c_uint32 * 3)(*grid)
        pointers = (_POINTER * len(arguments))(*(ctypes.addressof(value) for value in arguments))
        shared = ctypes.c_uint64(shared_bytes)
        if self._library.ptx_launch(_POINTER(host_function), along, threads, shared, pointers, cooperative) < 0:
            raise RuntimeError(self.error())

    def set_order(self, order: str) -> None:
        """Sets the order of the warps of a block and the blocks of a grid."""
        self._library.ptx_set_order(ORDERS[order])

    def set_product_model(self, machine: int, group: int, extra_bits: int) -> None:
        """Sets how tensor cores add: products in a group, and bits beyond the 24 of a float that are kept."""
        self._library.ptx_set_product_model(machine, group, extra_bits)

    def reset(self, machine: int) -> None:
        self._library.ptx_reset(machine)

    def set_dry(self, machine: int, dry: bool) -> None:
        """Sets whether launches are only recorded, not executed."""
        self._library.ptx_set_dry(machine, dry)

    def counts(self, machine: int, all_: bool = False) -> list[Count]:
        """Returns the instructions that were executed since the last reset; `all_`: those that were not as well."""
        lines = self._library.ptx_counts(machine, all_).decode().splitlines()
        fields = (line.split("\t") for line in lines)
        return [Count(*names[:4], *map(int, names[4:])) for names in fields]

    def launches(self, machine: int) -> list[Launch]:
        lines = self._library.ptx_launches(machine).decode().splitlines()
        fields = (line.split("\t") for line in lines)
        return [Launch(f[0], tuple(map(int, f[1:4])), int(f[4]), int(f[5])) for f in fields]
