"""The files of the disk cache: what a process left is used as it was written, or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from support.machine.full_disk import files_end_at

from cpr_fast.data.files.cached.store import BLOCK, RECORD, BlockStore, Key
from cpr_fast.errors import InputError

KEY = Key.of("https://h/a.mp4", (5, '"1"'))
DATA = [np.random.default_rng(i).integers(0, 256, BLOCK, np.uint8).tobytes() for i in range(5)]


@pytest.fixture
def folder(tmp_path) -> Path:
    store = BlockStore(tmp_path, 6)
    for slot, data in enumerate(DATA):
        store.write(slot, KEY, 10 + slot, data)
    store.write(5, KEY, 2, b"end")
    store.close()
    return tmp_path


def test_a_later_process_reads_what_an_earlier_one_wrote(folder):
    store = BlockStore(folder, 6)
    assert [store.read(slot, KEY, 10 + slot) for slot in range(5)] == DATA and store.read(5, KEY, 2) == b"end"
    assert store.records["block"].tolist() == [10, 11, 12, 13, 14, 2] and store.records["length"][5] == 3
    store.close()


def test_another_object_another_version_and_another_block_are_not_mistaken(folder):
    store = BlockStore(folder, 6)
    for other in (Key.of("https://h/b.mp4", (5, '"1"')), Key.of("https://h/a.mp4", (5, '"2"'))):
        assert store.read(0, other, 10) is None
    assert store.read(0, KEY, 11) is None
    store.close()


def test_damage_and_writes_that_were_interrupted_are_noticed(folder):
    blocks, records = folder / "process-0" / "blocks", folder / "process-0" / "records"
    with open(blocks, "r+b") as file:
        file.seek(BLOCK + 77)
        file.write(bytes([DATA[1][77] ^ 1]))  # one bit
        file.seek(2 * BLOCK)
        file.write(DATA[0][: BLOCK // 2])  # another block was being written over this one
        file.truncate(5 * BLOCK + 1)
    with open(records, "r+b") as file:
        file.seek(3 * RECORD.itemsize + 28)
        file.write(b"\xff\xff\xff\xff")  # an impossible length
        file.truncate(5 * RECORD.itemsize + 7)  # in the middle of the last record
    store = BlockStore(folder, 6)
    found = [store.read(slot, KEY, 10 + slot) for slot in range(5)]
    assert found == [DATA[0], None, None, None, DATA[4]] and store.read(5, KEY, 2) is None
    store.close()


def test_a_far_block_is_believed_only_if_it_is_as_it_was_written(folder):
    store = BlockStore(folder, 7)
    store.write(6, KEY, 2**30, b"of an object of 16 TiB")
    store.close()
    records = np.fromfile(folder / "process-0" / "records", RECORD)
    records["block"][[1, 2]] = 11 ^ 2**26, 12 ^ 2**4
    records.tofile(folder / "process-0" / "records")
    store = BlockStore(folder, 7)
    assert [store.is_plausible(slot) for slot in range(7)] == [True, False, True, True, True, True, True]
    assert store.read(2, KEY, 12 ^ 2**4) is None  # near: noticed when it is read
    store.close()


def test_a_smaller_cache_gives_back_the_disk_space(folder):
    store = BlockStore(folder, 2)
    assert (folder / "process-0" / "blocks").stat().st_size == 2 * BLOCK and len(store.records) == 2
    assert store.read(1, KEY, 11) == DATA[1]
    store.close()


def test_a_cache_is_no_larger_than_its_disk(folder):
    store = BlockStore(folder, 2**40)
    assert len(store.records) <= shutil.disk_usage(folder).total // BLOCK
    assert store.read(1, KEY, 11) == DATA[1]
    store.close()


def test_every_process_has_files_of_its_own(folder):
    first, second = BlockStore(folder, 2), BlockStore(folder, 2)
    assert (first.folder.name, second.folder.name) == ("process-0", "process-1")
    assert second.read(0, KEY, 10) is None
    first.close()
    third = BlockStore(folder, 2)
    assert third.folder == first.folder and third.read(0, KEY, 10) == DATA[0]
    second.close()
    third.close()


def test_a_full_disk_and_a_folder_that_cannot_be_written_are_errors(folder, tmp_path):
    store = BlockStore(folder, 9)
    with files_end_at(6 * BLOCK + 100), pytest.raises(OSError, match="too large"):
        store.write(6, KEY, 20, DATA[0])
    assert store.read(6, KEY, 20) is None and store.read(4, KEY, 14) == DATA[4]
    store.close()
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"data.disk_cache: cannot write to '.*file': Not a directory"):
        BlockStore(tmp_path / "file", 3)
