"""Files with the types that training scripts save beside their tensors, with refused types, and damaged files."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import os
import pathlib
import sys
import types
import zipfile

import numpy as np
import pytest
import torch

from cpr_fast.weights.reading import CheckpointError, DamagedCheckpointError, read_torch

EXPECTED = "expected a file of this test"
LEGACY = {"zip": {}, "legacy": {"_use_new_zipfile_serialization": False}}  # legacy: torch before 1.6

NUMPY_SCALARS = [
    *(np.dtype(code).type(3) for code in "bBhHiIlLqQefdFDg"),
    np.uint64(2**64 - 1),
    np.int64(-(2**63)),
    np.float32("nan"),
    np.complex64(1 - 2j),
    np.bool_(True),
    np.str_("größe"),
    np.str_(""),
    np.bytes_(b"ab\x00c"),
    np.bytes_(b""),
    np.datetime64("2021-03-04T05:06:07"),
    np.datetime64("2021-03", "M"),
    np.datetime64("NaT"),
    np.timedelta64(7, "ms"),
    np.float64(1.5).astype(">f8"),
]
NUMPY_ARRAYS = [
    np.arange(6, dtype=np.int16).reshape(2, 3),
    np.asfortranarray(np.random.default_rng(0).normal(size=(3, 4, 2))),
    np.arange(5, dtype=">i4"),
    np.zeros((2, 0), np.float16),
    np.array(3.5),
    np.array([True, False]),
    np.array(["a", "ßcd"]),
    np.array([b"a", b""]),
    np.array(["2020-01-01", "NaT"], "datetime64[D]"),
    np.arange(10)[::3],
]
PLAIN = [
    collections.OrderedDict(a=1, b=[2]),
    collections.Counter("hello"),
    {1, 2, "x"},
    frozenset({3}),
    (1, (2.5, None), [True]),
    b"",
    b"\xff\x00",
    bytearray(b"x"),
    1 + 2j,
    range(2, 9, 3),
    slice(1, None, 2),
    "",
    "ü",
    2**70,
    torch.float16,
    torch.device("cpu"),
    torch.Size([2, 3]),
    datetime.datetime(2021, 2, 3, 4, 5, tzinfo=datetime.UTC),
    datetime.date(2020, 1, 2),
    datetime.timedelta(days=2, seconds=1),
    decimal.Decimal("1.10"),
    types.SimpleNamespace(x=[1]),
    np.dtype("float32"),
    np.dtype(">u2"),
    np.dtype("datetime64[us]"),
    np.float32,
    int,
]


def names(values) -> list[str]:
    return [f"{type(value).__name__}-{i}" for i, value in enumerate(values)]


def saved_and_read(value, path, **options):
    torch.save({"epoch": 3, "weights": torch.ones(2), "value": value, "nested": [{"value": (value,)}]}, path, **options)
    payload = read_torch(path, expected=EXPECTED)
    assert payload["epoch"] == 3 and torch.equal(payload["weights"], torch.ones(2))
    return payload["value"], payload["nested"][0]["value"][0]


@pytest.mark.parametrize("form", LEGACY)
@pytest.mark.parametrize("value", [*NUMPY_SCALARS, *NUMPY_ARRAYS], ids=names([*NUMPY_SCALARS, *NUMPY_ARRAYS]))
def test_numpy_values_come_back(tmp_path, value, form):
    for got in saved_and_read(value, tmp_path / "a.pt", **LEGACY[form]):
        assert isinstance(got, np.ndarray) == isinstance(value, np.ndarray) and got.dtype == value.dtype
        np.testing.assert_array_equal(got, value)


@pytest.mark.parametrize("form", LEGACY)
@pytest.mark.parametrize("value", PLAIN, ids=names(PLAIN))
def test_values_of_python_come_back(tmp_path, value, form):
    for got in saved_and_read(value, tmp_path / "a.pt", **LEGACY[form]):
        assert type(got) is type(value) and got == value


def test_what_becomes_a_simpler_type(tmp_path):
    by_class = collections.defaultdict(list, {"a": [np.float32(1)]})
    loss = argparse.Namespace(lr=np.float64(0.1), path=pathlib.Path("a/b"), lists=[np.arange(3)])
    queue = collections.deque([1, np.int8(2)], maxlen=5)
    cases = {
        "by_class": (by_class, {"a": [1.0]}),
        "queue": (queue, [1, 2]),
        "windows": (pathlib.PureWindowsPath("C:/x/y"), pathlib.PureWindowsPath("C:/x/y")),
        "pure": (pathlib.PurePosixPath("/x/y"), pathlib.PurePosixPath("/x/y")),
        "path": (pathlib.Path("x.pt"), pathlib.PurePath("x.pt")),
    }
    for name, (value, expected) in cases.items():
        got, _ = saved_and_read(value, tmp_path / f"{name}.pt")
        assert got == expected and type(got) is type(expected), name
    got, _ = saved_and_read(loss, tmp_path / "namespace.pt")
    assert (got.lr, got.path) == (0.1, pathlib.PurePath("a/b")) and got.lists[0].tolist() == [0, 1, 2]


@pytest.mark.parametrize(("module", "name"), [("easydict", "EasyDict"), ("yacs.config", "CfgNode")])
def test_dicts_of_configuration_packages_need_no_package(tmp_path, monkeypatch, module, name):
    kind = type(name, (dict,), {"__module__": module})
    for part in ("yacs", module):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    setattr(sys.modules[module], name, kind)
    config = kind(model=kind(depth=18))
    config.__dict__["frozen"] = True
    torch.save({"config": config}, tmp_path / "a.pt")
    monkeypatch.undo()
    assert read_torch(tmp_path / "a.pt", expected=EXPECTED)["config"] == {"model": {"depth": 18}}


def test_shared_and_circular_values(tmp_path):
    shared = [np.int32(1)]
    loop = {"shared": shared, "again": shared}
    loop["self"] = loop
    torch.save(loop, tmp_path / "a.pt")
    got = read_torch(tmp_path / "a.pt", expected=EXPECTED)
    assert got["shared"] is got["again"] and got["self"] is got and got["shared"] == [1]


class Meter:
    """A class of a training script."""

    def __init__(self):
        self.mean = 0.5


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


REFUSED = {
    "a class of the script": (Meter(), r"\S*test_reading\.Meter"),
    "a function that would run": (Call(os.mkdir, "executed"), r"(posix|nt)\.mkdir"),
    "a class with a constructor": (Call(zipfile.ZipFile, "executed", "w"), r"zipfile\.ZipFile"),
    "NumPy objects": (np.array([{}, 1], object), r"numpy\.dtype\('O8'\)"),
    "a NumPy structure": (np.zeros(2, [("a", "i4"), ("b", "f8")]), r"numpy\.dtype\('V12'\)"),
    "a random generator": (np.random.default_rng(0), r"numpy\.random\S+"),
}


@pytest.mark.parametrize("form", LEGACY)
@pytest.mark.parametrize("case", REFUSED)
def test_a_type_that_is_not_read_is_named_and_nothing_runs(tmp_path, monkeypatch, case, form):
    monkeypatch.chdir(tmp_path)
    value, name = REFUSED[case]
    torch.save({"state_dict": {"w": torch.ones(3)}, "extra": value}, "a.pt", **LEGACY[form])
    with pytest.raises(
        CheckpointError,
        match=rf"^checkpoint 'a.pt' holds {name}, which is not among the types that are read, because it could run "
        rf"code from the file\. The file is not damaged: .*save it again without that object, .*; {EXPECTED}$",
    ) as refused:
        read_torch("a.pt", expected=EXPECTED)
    assert not isinstance(refused.value, DamagedCheckpointError)  # a run would set a damaged file aside
    assert sorted(os.listdir()) == ["a.pt"]


@pytest.mark.parametrize("form", LEGACY)
@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_another_pickle_protocol_is_not_called_damage(tmp_path, protocol, form):
    torch.save({"w": torch.ones(3), "name": b"x", "text": "y" * 300}, tmp_path / "a.pt", pickle_protocol=protocol,
               **LEGACY[form])  # fmt: skip
    with pytest.raises(
        CheckpointError, match=rf"written with pickle protocol {protocol}.*not damaged.*{EXPECTED}"
    ) as e:
        read_torch(tmp_path / "a.pt", expected=EXPECTED)
    assert not isinstance(e.value, DamagedCheckpointError)


def test_other_archives_are_not_called_damaged(tmp_path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "program.pt")
    with pytest.raises(CheckpointError, match=r"is a TorchScript program, .*save the state_dict"):
        read_torch(tmp_path / "program.pt", expected=EXPECTED)
    np.savez(tmp_path / "arrays.npz", a=np.ones(3))
    with pytest.raises(CheckpointError, match=rf"is not damaged, but torch cannot read it \(.+\); {EXPECTED}"):
        read_torch(tmp_path / "arrays.npz", expected=EXPECTED)


@pytest.mark.parametrize("form", LEGACY)
def test_a_file_that_was_cut_anywhere_is_damaged(tmp_path, form):
    path = tmp_path / "a.pt"
    meter = {"w": torch.arange(40.0), "acc": np.float32(1), "meter": Meter()}  # a truncated file hides the refusal
    for payload in (meter, {k: v for k, v in meter.items() if k != "meter"}):
        torch.save(payload, path, **LEGACY[form])
        content = path.read_bytes()
        pickles = content.find(b"Meter") if "meter" in payload and form == "legacy" else len(content)
        for size in [*range(0, pickles, 41), len(content) - 1]:
            path.write_bytes(content[:size])
            if "meter" in payload and form == "legacy" and size == len(content) - 1:
                continue  # the pickles are complete, so the refusal is true
            with pytest.raises(
                DamagedCheckpointError, match=r"a.pt' is (empty|truncated or damaged|not a checkpoint);"
            ):
                read_torch(path, expected=EXPECTED)


def test_a_flipped_byte_is_damage_if_torch_sees_it(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"w": torch.ones(8), "meter": Meter()}, path)
    content = bytearray(path.read_bytes())
    place = content.find(b"Meter")
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=r"is truncated or damaged; "):  # by the archive's checksum
        read_torch(path, expected=EXPECTED)
