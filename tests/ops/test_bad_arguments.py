"""Every operator rejects invalid values of every argument, with an error that starts with the name of the argument."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from cpr_fast.ops import cascade_mil_nce, cascade_select, mil_nce, tvl1_flow

X, SLOTS = torch.rand(2, 4, 8), torch.zeros(9, dtype=torch.int64)
GOOD = {
    cascade_select: {"queries": X, "memory": torch.rand(2, 9, 8), "views": [0, 1], "keep": [5, 2],
                     "query_ids": SLOTS[:4], "memory_ids": SLOTS, "precision": "fp32"},
    mil_nce: {"query": X[0], "own_key": X[1], "memory": torch.rand(9, 8), "positives": SLOTS[:4, None],
              "query_ids": SLOTS[:4], "memory_ids": SLOTS, "same_id": "ignore", "self_positive": "keep",
              "temperature": 0.1, "reduction": "mean"},
    cascade_mil_nce: {"queries": X, "own_key": X[1], "memory": torch.rand(2, 9, 8), "views": [0, 1], "keep": [5, 2],
                      "view": 1, "query_ids": SLOTS[:4], "memory_ids": SLOTS, "same_id": "ignore",
                      "self_positive": "keep", "temperature": 0.1, "reduction": "mean", "precision": "fp32"},
    tvl1_flow: {"frames": torch.rand(2, 20, 24), "tau": 0.25, "lambda_": 0.15, "theta": 0.3, "scales": 1,
                "scale_step": 0.8, "warps": 1, "epsilon": 0.01, "inner_iterations": 1, "outer_iterations": 1,
                "median": 3},
}  # fmt: skip
OPTIONAL = {"positives", "query_ids", "memory_ids"}


def wrong_values(name: str, good) -> dict[str, object]:
    """Returns values that are never valid for the argument, by a description of what is wrong."""
    if isinstance(good, torch.Tensor):
        wrong = {
            "an array": good.numpy(), "a list": good.tolist(), "a number": 1, "a string": "x", "no rows": good[:0],
            "a dimension too many": good[None, None], "bool": good.bool(), "complex": good.to(torch.complex64),
            "sparse": good.to_sparse(), "nested": torch.nested.nested_tensor([good]), "int32": good.int(),
            "no dimension": good.flatten()[0],
        }  # fmt: skip
        if name == "frames":
            wrong |= {"double": good.double(), "half": good.half(), "one frame": good[:1]}
            del wrong["a dimension too many"]  # leading dimensions are allowed
        elif name in OPTIONAL:
            wrong |= {"float": good.float(), "another device": good.to("meta"), "fewer rows": good[:-1]}
        else:
            wrong |= {"int64": good.long(), "None": None, "another dtype": good.bfloat16()}
        return wrong
    if isinstance(good, list):
        meta = torch.tensor(good, device="meta")
        wrong = {"an int": 0, "a string": "01", "floats": [0.0, 1.0], "bools": [True, True], "strings": ["0", "1"]}
        return wrong | {
            "None": None,
            "empty": [],
            "a set": {1, 2},
            "negative": [-1, -2],
            "meta": meta,
            "huge": [2**62] * 2,
            "a matrix": np.ones((2, 1)),
        }
    if isinstance(good, str):
        return {"another word": "fp8", "a number": 1, "None": None, "bytes": b"fp32", "a bool": True}
    wrong = {"a string": "1", "a bool": True, "None": None, "negative": -good, "a list": [good], "complex": 1j}
    wrong |= {"an array": np.array([good])}
    if isinstance(good, float):
        return wrong | {"nan": float("nan"), "infinite": float("inf")}
    return wrong | {"a fraction": good + 0.5, "too large": 2**40, "a float": float(good)}


CASES = [
    pytest.param(function, name, value, id=f"{function.__name__}-{name}-{kind}")
    for function, arguments in GOOD.items()
    for name, good in arguments.items()
    for kind, value in wrong_values(name, good).items()
]


@pytest.mark.parametrize(("function", "name", "value"), CASES)
def test_what_an_argument_cannot_mean_is_refused_by_name(function, name, value):
    with pytest.raises((TypeError, ValueError)) as caught:
        function(**{**GOOD[function], name: value})
    # Two contradictory arguments raise one error, which may name either of them or both.
    related = {
        "queries": "memory",
        "query": "own_key",
        "own_key": "memory",
        "views": "views, keep",
        "keep": "views, keep",
    }
    first = str(caught.value).splitlines()[0]
    assert first.startswith((f"{name}:", f"{related.get(name, name)}:")), first
    assert "expected" in first or "got" in first


@pytest.mark.parametrize("function", GOOD)
def test_the_good_arguments_are_good(function):
    function(**GOOD[function])


@pytest.mark.parametrize("make", [np.float32, np.float64, int, float])
def test_numbers_of_any_kind_are_numbers(make):
    temperature = make(1)
    assert torch.equal(mil_nce(X[0], X[1], X[0], temperature=temperature), mil_nce(X[0], X[1], X[0], temperature=1.0))


@pytest.mark.parametrize("make", [tuple, np.array, torch.tensor, lambda x: list(map(np.int64, x))])
def test_sequences_of_any_kind_are_sequences(make):
    expected = cascade_select(X, X, [0, 1], [3, 2])
    found = cascade_select(X, X, make([0, 1]), make([3, 2]))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("function", [cascade_select, mil_nce, cascade_mil_nce])
def test_meta_tensors_give_shapes_and_the_same_errors(function):
    meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in GOOD[function].items()}
    found, expected = function(**meta), function(**GOOD[function])
    for x, y in zip(*((r if isinstance(r, tuple) else (r,)) for r in (found, expected)), strict=True):
        assert x.is_meta and x.shape == y.shape and x.dtype == y.dtype
    with pytest.raises(TypeError, match="memory: "):
        function(**{**meta, "memory": meta["memory"].bfloat16()})


@pytest.mark.parametrize("function", GOOD)
def test_fake_tensors_give_shapes_and_the_same_errors(function):
    name, expected = next(iter(GOOD[function])), function(**GOOD[function])
    with FakeTensorMode() as mode:
        fake = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in GOOD[function].items()}
        found = function(**fake)
        for x, y in zip(*((r if isinstance(r, tuple) else (r,)) for r in (found, expected)), strict=True):
            assert x.shape == y.shape and x.dtype == y.dtype
        with pytest.raises(TypeError, match=f"{name}: "):
            function(**{**fake, name: fake[name].double().to(torch.complex64)})


@pytest.mark.parametrize("function", GOOD)
def test_compiled_programs_refuse_too(function):
    name = next(iter(GOOD[function]))

    def call(tensor):
        return function(**{**GOOD[function], name: tensor})

    with pytest.raises(Exception, match=f"{name}: expected"):
        torch.compile(call, fullgraph=True, backend="eager")(GOOD[function][name].long())


@pytest.mark.parametrize("function", GOOD)
def test_no_slices_to_map_over_are_refused(function):
    name, good = next(iter(GOOD[function].items()))
    called = "cascade_select" if function is cascade_mil_nce else function.__name__  # under vmap it calls the two
    with pytest.raises(ValueError, match=f"{called}: expected one slice or more to map over"):
        torch.vmap(lambda tensor: function(**{**GOOD[function], name: tensor}))(good.new_zeros(0, *good.shape))


@pytest.mark.parametrize(
    "call",
    [
        lambda: cascade_select(X[:, :1].expand(2, 2**16, 8), X, [0, 1], [2**39] * 2),
        lambda: tvl1_flow(torch.zeros(1, 1, 1, dtype=torch.uint8).expand(2, 300_000_000, 300_000_000)),
    ],
)
def test_results_that_no_memory_holds_are_named_with_their_size(call):
    with pytest.raises(MemoryError, match=r"^(cascade_select|tvl1_flow): out of memory .*(549755813888|300000000)"):
        call()


@pytest.mark.parametrize("temperature", [1e-46, 5e-324, 1e39, torch.tensor(1e-300, dtype=torch.float64)])
def test_a_temperature_that_float32_rounds_to_zero_or_infinity_is_refused(temperature):
    with pytest.raises(ValueError, match=r"temperature: expected 1.2e-38 to 3.4e\+38 \(float32\), got "):
        mil_nce(X[0], X[1], X[0], temperature=temperature)


NUMBERS = [
    (function, name) for function in GOOD for name, good in GOOD[function].items() if type(good) in (int, float, list)
]


@pytest.mark.parametrize("value", [10**400, -(10**5000), Fraction(10**400)], ids=["1e400", "-1e5000", "fraction"])
@pytest.mark.parametrize(("function", "name"), NUMBERS, ids=lambda value: getattr(value, "__name__", value))
def test_a_number_that_no_machine_holds_is_refused_by_name(function, name, value):
    with pytest.raises((TypeError, ValueError), match=f"^{name}: expected .{{0,90}}, got .{{0,90}}$"):
        function(**GOOD[function] | {name: [value, value] if isinstance(GOOD[function][name], list) else value})


@pytest.mark.parametrize("name", ["tau", "lambda_", "theta"])
@pytest.mark.parametrize("value", [1e-46, 1e39])
def test_a_setting_of_flow_that_float32_rounds_to_zero_or_infinity_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name}: expected 1.2e-38 to 3.4e\+38 \(float32\), got "):
        tvl1_flow(torch.rand(2, 20, 24), **{name: value})


def test_a_pyramid_of_too_many_levels_is_refused_before_it_fills_the_memory():
    with pytest.raises(ValueError, match=r"scale_step: expected .* at most 1000 levels .*, got 0.999999, which makes"):
        tvl1_flow(torch.rand(2, 20, 24), scales=2**30, scale_step=1 - 1e-6)


COLOUR = [
    (32, 48, 3),
    (32, 48, 4),
    (5, 32, 32, 3),
    (5, 32, 32, 4),
    (5, 32, 32, 1),
    (5, 3, 32, 32),
    (2, 5, 3, 32, 32),
    (2, 3, 5, 32, 3),
]


@pytest.mark.parametrize("shape", COLOUR)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_colour_is_not_taken_for_frames(shape, dtype):
    with pytest.raises(ValueError, match="frames: expected grey frames .* looks like channels"):
        tvl1_flow(torch.zeros(shape, dtype=dtype))


def test_clips_of_three_frames_have_a_way_in():
    clips = torch.rand(2, 3, 20, 24)
    pairs = tvl1_flow(clips.unfold(-3, 2, 1).movedim(-1, -3), scales=1, warps=1).squeeze(2)
    assert torch.equal(pairs, torch.stack([tvl1_flow(clip, scales=1, warps=1) for clip in clips]))


@pytest.mark.parametrize("value", [255.0, 1.01, -0.01, float("nan"), float("inf"), -float("inf")])
def test_float_frames_outside_their_range_are_refused(value):
    frames = torch.rand(3, 20, 24)
    frames[1, 2, 3] = value
    with pytest.raises(ValueError, match="frames: expected float values in 0..1, got values from"):
        tvl1_flow(frames)
    # If values are not checked, the flow of the two pairs with that frame is NaN, and that of other pairs is not.
    frames = torch.cat([frames, torch.rand(1, 20, 24)])
    flow = torch.compile(lambda x: tvl1_flow(x, scales=1, warps=1), fullgraph=True, backend="eager")(frames)
    assert flow[:2].isnan().all() and flow[2].isfinite().all()


def test_a_frame_just_above_one_by_rounding_is_taken():
    tvl1_flow(torch.full((2, 20, 24), 1.0 + 1e-6), scales=1, warps=1)


def test_flow_refuses_a_gradient_that_it_cannot_give():
    frames = torch.rand(2, 20, 24, requires_grad=True)
    with pytest.raises(ValueError, match="frames: tvl1_flow has no gradient"):
        tvl1_flow(frames)
    with torch.no_grad():
        tvl1_flow(frames, scales=1, warps=1)
