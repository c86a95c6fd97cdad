"""Small kernels written in PTX, to test the interpreter one instruction at a time."""

from __future__ import annotations

import ctypes
import itertools

import torch
from support.ptx.interpreter import Count, Interpreter

_HEAD = """
.version 8.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry kernel({parameters})
{{
  .reg .pred %p<16>; .reg .b16 %rs<16>; .reg .b32 %r<64>; .reg .f32 %f<128>; .reg .b64 %rd<32>; .reg .f64 %fd<16>;
  mov.u32 %r0, %tid.x;
"""
_functions = itertools.count(16)  # stand for host functions; no function has such an address


class Program:
    """A kernel with one pointer for each of `tensors`, in %rd0, %rd1 and so on; %r0 is the thread."""

    def __init__(self, interpreter: Interpreter, body: str, tensors: int):
        parameters = ", ".join(f".param .u64 p{i}" for i in range(tensors))
        pointers = "".join(f"  ld.param.u64 %rd{i}, [p{i}];\n" for i in range(tensors))
        self._interpreter, self._function = interpreter, next(_functions)
        self.machine = interpreter.load(
            (_HEAD.format(parameters=parameters) + pointers + body + "\n ret;\n}\n").encode()
        )
        interpreter.bind(self._function, self.machine, "kernel")

    def run(self, *tensors: torch.Tensor, grid=(1, 1, 1), threads=32, shared_bytes=0, cooperative=False) -> None:
        pointers = [ctypes.c_uint64(tensor.data_ptr()) for tensor in tensors]
        self._interpreter.launch(self._function, grid, threads, shared_bytes, pointers, cooperative)

    def count(self, opcode: str) -> Count:
        """Returns what the only instruction with this opcode did."""
        (found,) = [count for count in self._interpreter.counts(self.machine) if count.opcode == opcode]
        return found


def each_lane(interpreter: Interpreter, instruction: str, out: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
    """Runs an instruction on 32 lanes and returns its results. `{0}` stands for the destination, `{1}` and so on for
    the sources; every tensor has one element a lane, and a dtype that says which registers hold it."""
    kinds = {torch.float32: ("f32", "%f", 4), torch.int32: ("b32", "%r", 4), torch.float64: ("f64", "%fd", 8)}
    kinds |= {torch.int64: ("b64", "%rd", 8), torch.int16: ("b16", "%rs", 2)}
    tensors, registers, body = [out, *sources], [], ""
    for i, tensor in enumerate(tensors):
        kind, prefix, width = kinds[tensor.dtype]
        registers.append(f"{prefix}{10 + i}")
        body += f"mul.wide.u32 %rd{20 + i}, %r0, {width}; add.s64 %rd{20 + i}, %rd{20 + i}, %rd{i};\n"
        body += f"ld.global.{kind} {registers[i]}, [%rd{20 + i}];\n" if i else ""
    body += instruction.format(*registers) + f"\nst.global.{kinds[out.dtype][0]} [%rd20], {registers[0]};"
    Program(interpreter, body, len(tensors)).run(*tensors)
    return out
