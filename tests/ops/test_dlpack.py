"""The operators for arrays of other libraries: the bits of torch, no copies, and errors that name the argument."""

from __future__ import annotations

import doctest
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from cpr_fast import ops
from cpr_fast.ops import dlpack

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
V, B, K, D, P = 2, 7, 83, 33, 5


def jax_numpy():
    return pytest.importorskip("jax.numpy", reason="needs JAX")


LIBRARIES = pytest.mark.parametrize("library", ["numpy", "jax"])


def arrays_of(library: str):
    """Returns a function that makes an array of the library from a NumPy array."""
    return np.asarray if library == "numpy" else jax_numpy().asarray


def inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    features = rng.standard_normal((V, B + K, D), dtype=np.float32)
    features /= np.linalg.norm(features, axis=2, keepdims=True)
    return {
        "queries": features[:, K:],  # not contiguous
        "memory": features[:, :K],
        "query_ids": np.arange(B),
        "memory_ids": np.arange(K) % 11 - 1,
        "positives": rng.integers(-1, K, (B, P)),
    }


def equal(array, tensor: torch.Tensor) -> bool:
    found = np.asarray(array)
    return found.shape == tuple(tensor.shape) and np.array_equal(found, tensor.numpy())


@LIBRARIES
def test_results_are_those_of_torch_in_the_library_of_the_arguments(library):
    make, given = arrays_of(library), inputs()
    own = {name: make(array) for name, array in given.items()}
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in given.items()}
    ids = ("query_ids", "memory_ids")
    selected = dlpack.cascade_select(
        own["queries"], own["memory"], [1, 0, 1], (60, 20, P), **{name: own[name] for name in ids}
    )
    expected = ops.cascade_select(
        tensors["queries"], tensors["memory"], [1, 0, 1], (60, 20, P), **{name: tensors[name] for name in ids}
    )
    assert type(selected[0]) is type(own["queries"]) and all(map(equal, selected, expected))

    query = tensors["queries"][0].requires_grad_()
    key, memory = tensors["queries"][1].clone().requires_grad_(), tensors["memory"][0].clone().requires_grad_()
    settings = {"temperature": 0.2, "same_id": "ignore"}
    modes = np.arange(B) % 3
    loss = ops.mil_nce(query, key, memory, tensors["positives"], **{n: tensors[n] for n in ids},
                       self_positive=torch.from_numpy(modes), **settings)  # fmt: skip
    gradients = torch.autograd.grad(loss, (memory, query, key))
    arguments = (own["queries"][0], own["queries"][1], own["memory"][0], own["positives"])
    settings |= {name: own[name] for name in ids} | {"self_positive": make(modes)}
    value, found = dlpack.mil_nce_value_and_grad(*arguments, of=("memory", "query", "own_key"), **settings)
    assert type(value) is type(own["queries"]) and equal(value, loss.detach())
    assert len(found) == 3 and all(map(equal, found, gradients))
    assert equal(dlpack.mil_nce(*arguments, **settings), loss.detach())
    assert dlpack.mil_nce(*arguments, reduction="none", **settings).shape == (B,)

    frames = np.random.default_rng(0).integers(0, 256, (2, 4, 20, 24), dtype=np.uint8)
    flow = dlpack.tvl1_flow(make(frames), warps=2)
    assert type(flow) is type(own["queries"]) and equal(flow, ops.tvl1_flow(torch.from_numpy(frames), warps=2))


def test_the_gradient_is_that_of_finite_differences():
    """In float64, against central differences of the loss itself; slots are int32."""
    rng = np.random.default_rng(1)
    query, key, memory = (rng.standard_normal((n, 4)) for n in (2, 2, 9))
    slots = np.array([[0, 3], [8, -1]], dtype=np.int32)
    _, gradients = dlpack.mil_nce_value_and_grad(query, key, memory, slots, of=("query", "own_key", "memory"))
    for position, gradient in enumerate(gradients):
        for index in np.ndindex(gradient.shape):
            values = []
            for step in (1e-6, -1e-6):
                moved = [query.copy(), key.copy(), memory.copy()]
                moved[position][index] += step
                values.append(float(dlpack.mil_nce(*moved, slots)))
            assert gradient[index] == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-7)


@LIBRARIES
def test_memory_is_neither_copied_nor_written(library, monkeypatch):
    """The operator receives the memory of the arrays, and the caller that of the result."""
    make, seen = arrays_of(library), []
    memory, queries = make(np.ones((1, K, D), np.float32)), make(np.ones((1, B, D), np.float32))
    original = dlpack._cascade_select

    def spied(queries, memory, *arguments, **settings):
        results = original(queries, memory, *arguments, **settings)
        seen.extend([queries.data_ptr(), memory.data_ptr(), results[1].data_ptr()])
        return results

    monkeypatch.setattr(dlpack, "_cascade_select", spied)
    _, scores = dlpack.cascade_select(queries, memory, [0], [4])
    address = (lambda a: a.ctypes.data) if library == "numpy" else (lambda a: a.unsafe_buffer_pointer())
    assert seen == [address(queries), address(memory), address(scores)]
    assert np.all(np.asarray(memory) == 1) and np.all(np.asarray(queries) == 1)


def test_read_only_and_strided_arrays_are_taken():
    given = inputs()
    memory, queries = given["memory"], given["queries"]
    expected, _ = dlpack.cascade_select(queries, memory, [0], [P])
    memory.flags.writeable = False
    every_other = np.repeat(queries, 2, axis=2)[:, :, ::2]
    assert not every_other.flags.c_contiguous
    assert np.array_equal(dlpack.cascade_select(every_other, memory, [0], [P])[0], expected)
    shared = np.broadcast_to(memory[:1], memory.shape)  # strides of 0
    assert np.array_equal(dlpack.cascade_select(queries, shared, [0], [P])[0], expected)
    _, (gradient,) = dlpack.mil_nce_value_and_grad(queries[0], queries[1], memory[0], of=["memory"])
    assert gradient.shape == (K, D)


def test_tensors_are_arrays_too():
    query = torch.randn(B, D, requires_grad=True)
    memory = np.random.default_rng(0).standard_normal((K, D), dtype=np.float32)
    loss, (gradient,) = dlpack.mil_nce_value_and_grad(query, query, memory)
    assert isinstance(loss, torch.Tensor) and isinstance(gradient, torch.Tensor) and query.grad is None
    assert not loss.requires_grad and query.requires_grad
    with torch.no_grad():
        assert torch.equal(dlpack.mil_nce_value_and_grad(query, query, memory)[1][0], gradient)


class OnATpu:
    """An array on a device that torch does not have."""

    dtype = "float32"

    def __dlpack_device__(self):
        return (99, 0)

    def __dlpack__(self, **_):
        raise BufferError("no host memory")


ROW = np.ones((B, D), np.float32)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"memory": ROW[:, ::-1]}, ValueError, r"memory: expected an array without reversed dimensions, got strides"),
        ({"query": [[1.0]]}, TypeError, r"query: expected an array with __dlpack__ \(NumPy, CuPy, JAX\), got list"),
        (
            {"own_key": None},
            TypeError,
            r"own_key: expected an array with __dlpack__ \(NumPy, CuPy, JAX\), got NoneType",
        ),
        ({"memory": ROW.astype(">f4")}, TypeError, r"memory: torch cannot read numpy.ndarray of dtype >f4 by DLPack"),
        ({"memory": np.array([["a"]])}, TypeError, r"memory: torch cannot read numpy.ndarray of dtype <U1 by DLPack"),
        ({"query": OnATpu()}, TypeError, r"query: torch cannot read .*OnATpu of dtype float32 by DLPack"),
        ({"memory": ROW.astype(np.float64)}, TypeError, r"memory: expected the dtype of query, torch.float32, got"),
        ({"memory": ROW.astype(np.int64)}, TypeError, r"memory: expected dtype float32"),
        ({"query": ROW.astype(np.int64)}, TypeError, r"query: expected .*float.*, got torch.int64"),
        ({"query": ROW.astype(np.complex64)}, TypeError, r"query: expected .*float.*, got torch.complex64"),
        (
            {"query": ROW[:0], "own_key": ROW[:0]},
            ValueError,
            r"query: expected a non-empty shape \[B, D\], got \[0, 33\]",
        ),
        ({"positives": ROW}, TypeError, r"positives: expected integers that int64 holds, got torch.float32"),
        ({"positives": np.full((B, 1), B)}, IndexError, r"positives: expected memory slots"),
        ({"query_ids": np.arange(B)}, ValueError, r"query_ids: requires memory_ids"),
        ({"self_positive": ROW}, TypeError, r"self_positive: expected integers"),
        ({"temperature": np.ones(3)}, TypeError, r"temperature: expected a number, got numpy.ndarray"),
        ({"temperature": -1.0}, ValueError, r"temperature: expected a positive finite number"),
        ({"of": "query"}, TypeError, r"of: expected a sequence of names"),
        ({"of": ()}, TypeError, r"of: expected a sequence of names"),
        ({"of": ("temperature",)}, ValueError, r"of: expected one of 'query', 'own_key', 'memory', got 'temperature'"),
        ({"of": ("query", "query")}, ValueError, r"of: expected each name once"),
    ],
)
def test_bad_arguments_are_named(changed, error, message):
    arguments = {"query": ROW, "own_key": ROW, "memory": ROW} | changed
    with pytest.raises(error, match=message):
        dlpack.mil_nce_value_and_grad(**arguments)
    if "of" not in changed:
        with pytest.raises(error, match=message):
            dlpack.mil_nce(**arguments)


def test_bfloat16_of_numpy_is_named_and_that_of_jax_is_taken():
    jnp = jax_numpy()
    query = jnp.asarray(ROW, jnp.bfloat16)
    with pytest.raises(TypeError, match="query: torch cannot read numpy.ndarray of dtype bfloat16 by DLPack"):
        dlpack.mil_nce(np.asarray(query), ROW, ROW)
    _, (gradient,) = dlpack.mil_nce_value_and_grad(query, query, query)
    assert gradient.dtype == jnp.bfloat16


def test_a_traced_array_of_jax_is_named():
    jax = pytest.importorskip("jax", reason="needs JAX")
    with pytest.raises(TypeError, match="query: "):
        jax.jit(lambda x: dlpack.mil_nce(x, x, x))(ROW)


def test_the_example_for_jax_runs():
    pytest.importorskip("jax", reason="needs JAX")
    runpy.run_path(str(EXAMPLES / "jax_loss.py"), run_name="__main__")


def test_help_has_examples_that_run():
    assert doctest.testmod(dlpack, extraglobs={"numpy": np}).failed == 0
    assert doctest.testmod(dlpack, extraglobs={"numpy": np}).attempted >= 6


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32"])
def test_ids_of_other_integer_types_are_converted(dtype):
    given = inputs()
    queries, memory, ids = given["queries"], given["memory"], [given[name] + 1 for name in ("query_ids", "memory_ids")]
    expected = dlpack.cascade_select(queries, memory, [1], [P], query_ids=ids[0], memory_ids=ids[1])
    own = [array.astype(dtype) for array in ids]
    found = dlpack.cascade_select(queries, memory, [1], [P], query_ids=own[0], memory_ids=own[1])
    assert all(map(np.array_equal, found, expected))


def test_ids_that_int64_does_not_hold_and_masked_arrays_are_refused():
    given = inputs()
    queries, memory = given["queries"], given["memory"]
    with pytest.raises(TypeError, match=r"memory_ids: expected integers that int64 holds, got torch.uint64"):
        dlpack.cascade_select(queries, memory, [1], [P], query_ids=given["query_ids"],
                              memory_ids=np.arange(K, dtype=np.uint64))  # fmt: skip
    with pytest.raises(TypeError, match="memory: expected an array without a mask"):
        dlpack.cascade_select(queries, np.ma.masked_array(memory, mask=memory > 1), [1], [P])
