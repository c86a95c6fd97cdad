"""Runs the operators from the PTX that nvcc makes of their kernels, without a GPU, and counts what they do.

`host/` sends the launches of the unmodified host code to the interpreter, so plans, grids and workspaces are the real
ones. The C interface is that of the emulated device (tests/support/cuda_emulation): every test can run on either.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

from support.cuda_emulation.compile import OPERATORS
from support.cuda_emulation.device import Device
from support.ptx.build import build_host, compile_ptx
from support.ptx.interpreter import Count, Interpreter, Launch

ARCHITECTURES = ("80", "90a")
_ANONYMOUS = re.compile(r"_GLOBAL__N__[0-9a-f]{8}_\d+_\w+?_cu_[0-9a-f]{8}")


def host_symbol(entry: str) -> str:
    """Returns the name that g++ gives to a kernel: it mangles anonymous namespaces in another way than nvcc."""
    found = _ANONYMOUS.search(entry)
    return entry if found is None else entry.replace(f"{len(found[0])}{found[0]}", "12_GLOBAL__N_1")


class PtxDevice(Device):
    """The emulated device, whose kernels are executed from the PTX of one architecture."""

    def __init__(self, architecture: str):
        self.interpreter = Interpreter()
        host = build_host(self.interpreter.path)
        super().__init__(host)
        self.architecture = architecture
        self.machines = {
            operator: self.interpreter.load(compile_ptx(operator, architecture).read_bytes()) for operator in OPERATORS
        }
        self._symbols = self._host_functions(host)
        self.select()

    def _host_functions(self, host: Path) -> dict[str, int]:
        """Returns the addresses of the functions of the loaded host code."""
        listed = subprocess.run(["nm", str(host)], check=True, capture_output=True, text=True).stdout
        offsets = {fields[2]: int(fields[0], 16) for line in listed.splitlines() if len(fields := line.split()) == 3}
        anchor = ctypes.cast(self._library.emulation_set_order, ctypes.c_void_p).value
        return {name: anchor - offsets["emulation_set_order"] + offset for name, offset in offsets.items()}

    def select(self) -> None:
        """Makes the launches of the host code run this architecture; another device may have used it since."""
        self.set_capability(int(self.architecture[:2]))
        for machine in self.machines.values():
            for entry in self.interpreter.entries(machine):
                self.interpreter.bind(self._symbols[host_symbol(entry)], machine, entry)

    def set_order(self, order: str) -> None:
        super().set_order(order)
        self.interpreter.set_order(order)

    def set_occupancy(self, blocks: int) -> None:
        """Sets how many blocks of the kernel of tvl1_flow a multiprocessor holds."""
        self._library.interpreted_set_occupancy(blocks)

    def set_product_model(self, group: int, extra_bits: int) -> None:
        for machine in self.machines.values():
            self.interpreter.set_product_model(machine, group, extra_bits)

    def _run(self, *args, **kwargs) -> None:
        try:
            super()._run(*args, **kwargs)
        except RuntimeError as error:
            if "invalid configuration" not in str(error) or not self.interpreter.error():
                raise
            raise RuntimeError(self.interpreter.error()) from None

    def reset_counts(self) -> None:
        for machine in self.machines.values():
            self.interpreter.reset(machine)

    def set_dry(self, dry: bool) -> None:
        """Sets whether calls only plan: while dry, their launches are recorded, but not executed."""
        for machine in self.machines.values():
            self.interpreter.set_dry(machine, dry)

    def counts(self, operator: str, all_: bool = False) -> list[Count]:
        """Returns the instructions of an operator that were executed since the last reset; `all_`: every one of its
        PTX."""
        return self.interpreter.counts(self.machines[operator], all_)

    def launches_of(self, operator: str) -> list[Launch]:
        """Returns the launches of an operator since the last reset."""
        return self.interpreter.launches(self.machines[operator])
