"""LMDB files that are truncated, of another kind, or hold other things than lists of JPEGs under different names."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import lmdb
import msgpack
import numpy as np
import pytest
import simplejpeg
from support.processes import open_damaged_lmdb
from support.processes.open_damaged_lmdb import read_everything, write_more

from cpr_fast.data.index.build import IndexOptions, write_index
from cpr_fast.data.storage.record_writer import RecordWriter
from cpr_fast.data.storage.records import (
    Records,
    forget_records,
    frame_size,
    read_jpegs,
    read_record_frames,
)
from cpr_fast.data.video.container import VideoError
from cpr_fast.errors import InputError

NAMES = [f"c{i % 2}/v{i}" for i in range(4)]


def write(file: Path, frames: int = 20, **changes: bytes | None) -> Path:
    """Writes records of `frames` random pictures each; a change of None removes the key."""
    jpegs = [
        simplejpeg.encode_jpeg(np.random.default_rng(t).integers(0, 256, (40, 48, 3), np.uint8)) for t in range(frames)
    ]
    keys = [b"%09d" % i for i in range(len(NAMES))]
    entries = dict.fromkeys(keys, msgpack.packb(jpegs)) | {
        b"__order__": msgpack.packb(NAMES), b"__keys__": msgpack.packb(keys), b"__len__": msgpack.packb(len(keys)),
        b"__vlen__": msgpack.packb([frames] * len(keys)),
    }  # fmt: skip
    entries |= {key.encode(): value for key, value in changes.items()}
    with lmdb.open(str(file), subdir=False, map_size=2**25) as environment, environment.begin(write=True) as writing:
        for key, value in entries.items():
            if value is not None:
                writing.put(key, value)
    return file


def test_a_truncated_file_is_refused_and_does_not_end_the_process(tmp_path):
    """Reading a page of the mapped file that does not exist is a bus error; hence the process of its own."""
    file = write(tmp_path / "a.lmdb")
    whole = file.read_bytes()
    for missing in (len(whole) * 2 // 3, len(whole) // 3, 100_000, *(pages * 4096 for pages in (1, 2, 7, 15, 16, 17))):
        file.write_bytes(whole[: len(whole) - missing])
        code = "import sys; from cpr_fast.data.storage.records import *; Records(Path(sys.argv[1])).num_frames()"
        done = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True)
        assert done.returncode == 1, done
        assert f"is truncated: expected {len(whole):,} bytes, got {file.stat().st_size:,}" in done.stderr


@pytest.mark.parametrize("use", open_damaged_lmdb.USES)
def test_damaged_pages_are_named_and_do_not_end_the_process(tmp_path, use):
    """150 files with up to 20 wrong bytes in the pages of the tree."""
    command = [sys.executable, open_damaged_lmdb.__file__, tmp_path, use]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert set(said) == {"0", "2"} and said["2"] > 50, said


def test_a_damaged_jpeg_is_named_also_if_it_decodes(tmp_path):
    """JPEG has no checksums: about half of the pictures with a wrong byte decode without an error."""
    file, rng, decoded = tmp_path / "a.lmdb", np.random.default_rng(0), 0
    pictures = rng.integers(0, 256, (9, 40, 48, 3), np.uint8)
    with RecordWriter(file) as writer:
        writer.put("c/v", [simplejpeg.encode_jpeg(picture) for picture in pictures])
    whole = file.read_bytes()
    video = Path(f"{file}#c/v")
    jpegs = [bytes(jpeg) for jpeg in read_jpegs(video, range(9))]
    for number in range(40):
        frame = number % 9
        damaged, at = bytearray(jpegs[frame]), int(rng.integers(len(jpegs[frame])))
        damaged[at] ^= 1 << int(rng.integers(8))
        file.write_bytes(whole.replace(jpegs[frame], damaged))
        forget_records(file)
        with suppress(ValueError):
            decoded += simplejpeg.decode_jpeg(bytes(damaged)) is not None
        with pytest.raises(VideoError, match=rf"c/v': frame {frame} is damaged on the disk"):
            read_record_frames(video, [frame], "rgb")
        others = [other for other in range(9) if other != frame]
        assert [bytes(jpeg) for jpeg in read_jpegs(video, others)] == [jpegs[other] for other in others]
    assert decoded > 10


def test_free_pages_may_be_missing_at_the_end(tmp_path):
    """LMDB need not write pages that are freed in the transaction that takes them."""
    file = write(tmp_path / "a.lmdb")
    changes = [{b"big": bytes(500_000)}, {b"big": None}, {b"other": b"1"}, {b"other": b"2"}]
    with lmdb.open(str(file), subdir=False, map_size=2**25) as environment:
        for change in changes:
            with environment.begin(write=True) as writing:
                for key, value in change.items():
                    writing.delete(key) if value is None else writing.put(key, value)
    file.write_bytes(file.read_bytes()[: -100 * 4096])
    assert len(read_everything(file)) == len(NAMES)


def test_a_refused_file_does_not_stay_locked(tmp_path):
    file = write(tmp_path / "a.lmdb")
    whole = file.read_bytes()
    for damaged, message in ((file, "copy it again"), (Path(f"{file}.part"), "remove it, and the same command begins")):
        damaged.write_bytes(whole[:-4096])
        with pytest.raises(InputError, match=f"{damaged.name}' is truncated: .*; {message}"):
            RecordWriter(file)
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    Path(f"{file}.part").unlink()
    file.unlink()
    write_more(file)
    assert len(Records(file).names) == 4


def test_what_is_no_file_of_lmdb_is_described(tmp_path):
    os.mkfifo(tmp_path / "pipe.lmdb")
    (tmp_path / "empty.lmdb").touch()
    (tmp_path / "folder.lmdb").mkdir()
    (tmp_path / "noise.lmdb").write_bytes(bytes(range(256)) * 64)
    for name, message in {
        "pipe": "is a pipe, a device or a socket",
        "empty": "is empty",
        "folder": "is a folder without data.mdb",
        "noise": "MDB_INVALID: File is not an LMDB file",
        "none": "does not exist",
    }.items():
        with pytest.raises(InputError, match=f"{name}.lmdb'.*{message}"):
            Records(tmp_path / f"{name}.lmdb")


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([NAMES[0]] * 4, "expected different names in the key '__order__', got 'c0/v0' twice"),
        ([[name] for name in NAMES], "got list instead of a name"),
        ([0, 1, 2, 3], "got int instead of a name"),
        ("c0/v0", "got bytes instead of a list"),
        (dict.fromkeys(NAMES, 1), "got dict instead of a list"),
        (4, "got int instead of a list"),
    ],
)
def test_names_that_are_not_a_list_of_different_texts(tmp_path, order, message):
    with pytest.raises(InputError, match=message):
        Records(write(tmp_path / "a.lmdb", __order__=msgpack.packb(order)))


@pytest.mark.parametrize("key", ["__keys__", "__vlen__"])
@pytest.mark.parametrize("value", [3, ["x"], [b"000000099"] * 4, None, {"a": 1}, b"\xc1"])
def test_tables_of_lengths_that_cannot_be_meant(tmp_path, key, value):
    """Lengths are read from the table, or the file is refused; no other error leaves the reader."""
    records = Records(write(tmp_path / "a.lmdb", **{key: value if value == b"\xc1" else msgpack.packb(value)}))
    try:
        assert records.num_frames().keys() <= set(NAMES)
    except InputError as error:
        assert "'__keys__', '__vlen__' or a record are damaged" in str(error)


def test_a_record_without_frames(tmp_path):
    file = write(tmp_path / "a.lmdb", **{"000000002": msgpack.packb([])})
    with pytest.raises(VideoError, match="c0/v2': the record holds no frame"):
        frame_size(Path(f"{file}#c0/v2"))


@pytest.mark.parametrize("broken", [None, b"", msgpack.packb([]), msgpack.packb(3), msgpack.packb([b"no JPEG"])])
def test_flow_that_cannot_be_read_is_named_and_the_video_kept(tmp_path, broken):
    videos, flow = write(tmp_path / "v.lmdb"), write(tmp_path / "f.lmdb", frames=19, **{"000000002": broken})
    report = write_index(videos, tmp_path / "i.csv", IndexOptions(flow_lmdb=flow))
    assert report["videos"] == 4
    (problem,) = [row for row in report["problems"] if row["kind"] == "missing_flow"]
    assert problem["path"].endswith("c0/v2") and "its flow cannot be read: " in problem["reason"]
    assert [line.rpartition(",")[2] != "" for line in (tmp_path / "i.csv").read_text().splitlines()[1:]].count(
        False
    ) == 1


@pytest.mark.parametrize(("fields", "kept", "named"), [(19, 20, 0), (18, 19, 0), (20, 20, 0), (5, 6, 4), (50, 20, 4)])
def test_flow_of_another_length_is_named(tmp_path, fields, kept, named):
    report = write_index(
        write(tmp_path / "v.lmdb"), tmp_path / "i.csv", IndexOptions(flow_lmdb=write(tmp_path / "f.lmdb", fields))
    )
    assert [row["kind"] for row in report["problems"]].count("flow_length") == named
    assert {line.split(",")[4] for line in (tmp_path / "i.csv").read_text().splitlines()[1:]} == {str(kept)}
