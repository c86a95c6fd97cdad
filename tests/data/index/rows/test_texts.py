"""Strings in compressed parts: the same strings as in an array, in any order, in less memory."""

from __future__ import annotations

import random
import sys

import numpy as np
import pytest

from cpr_fast.data.index.rows.texts import PART, Texts

pa = pytest.importorskip("pyarrow", reason="pyarrow is an extra: pip install pyarrow")


def strings(count: int) -> list[str]:
    draw = random.Random(count)
    odd = ["", "ä/ö b.mp4", "x" * 5000, "日本/語#1+2/a.mp4", "\t", "a\0b"]
    return [draw.choice([*odd, f"train-{i // 7:06}.tar#{i}+{3 * i}/{i:08}.mp4"]) for i in range(count)]


@pytest.mark.parametrize("count", [1, 2, PART - 1, PART, PART + 1, 3 * PART + 17])
def test_every_string_comes_back(count):
    expected = strings(count)
    texts = Texts.of(pa.chunked_array([expected[: count // 3], expected[count // 3 :]], pa.string()))
    assert len(texts) == count and list(texts) == expected and texts.arrow().to_pylist() == expected
    for place in random.Random(1).sample(range(count), min(count, 50)):
        assert texts[place] == expected[place]


def test_strings_of_a_part_of_an_array_and_of_some_places():
    every = strings(4 * PART)
    texts, expected = Texts.of(pa.chunked_array([pa.array(every).slice(5, 3 * PART)])), every[5 : 5 + 3 * PART]
    assert list(texts) == expected
    draw = np.random.default_rng(0)
    for _ in range(2):  # places of places
        chosen = draw.permutation(len(expected))[: len(expected) - 100]
        texts, expected = texts.taken(chosen), [expected[place] for place in chosen.tolist()]
        assert len(texts) == len(expected)
        assert list(texts) == expected and texts.arrow().to_pylist() == expected
    assert (
        list(texts.taken(np.zeros(0, np.int64))) == [] and texts.taken(np.zeros(0, np.int64)).arrow().to_pylist() == []
    )


def test_only_empty_strings_and_none():
    assert list(Texts.of(pa.chunked_array([["", "", ""]]))) == ["", "", ""]
    none = Texts.of(pa.chunked_array([[]], pa.string()))
    assert len(none) == 0 and list(none) == []


def test_similar_paths_take_a_fraction_of_their_memory():
    paths = [f"shards/train-{i // 100:06}.tar#{512 + 90_112 * (i % 100)}+88211/{i:08}.mp4" for i in range(20_000)]
    texts = Texts.of(pa.chunked_array([paths]))
    assert sys.getsizeof(texts._packed) + texts._places.nbytes < sum(map(len, paths)) / 4
