"""JPEG records in LMDB files: CoCLR's format is written, and requested frames are read in both encodings."""

import io
from concurrent.futures import ThreadPoolExecutor
from zlib import crc32

import lmdb
import msgpack
import numpy as np
import pytest
from cpr_fast._host import msgpack_spans
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.machine.full_disk import files_end_at

from cpr_fast.data.storage.media import read_parts
from cpr_fast.data.storage.record_writer import RecordWriter
from cpr_fast.data.storage.records import (
    frame_size,
    open_records,
    read_jpegs,
    read_record_frames,
    record_path,
    require_frames,
    split_record,
)
from cpr_fast.data.video.container import VideoError
from cpr_fast.data.video.decode import joined
from cpr_fast.data.video.pixels import Region
from cpr_fast.errors import InputError

LENGTHS = {"Zumba/v_Zumba_g01_c01": 7, "Archery/Day_#_2": 300, "Archery/none": 0, "Archery/one": 1}


def jpeg(number: int, height: int = 24, width: int = 33, **options) -> bytes:
    noise = np.random.default_rng(number).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3)).astype(np.uint8)
    picture = noise.repeat(4, 0).repeat(4, 1)[:height, :width]
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", **({"quality": 95} | options))
    return buffer.getvalue()


def pictures(seed: int, count: int) -> list[bytes]:
    return [jpeg(1000 * seed + i) for i in range(count)]


def by_pil(encoded: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def luma_by_pil(encoded: bytes) -> np.ndarray:
    picture = Image.open(io.BytesIO(encoded))
    picture.draft("L", picture.size)
    return np.asarray(picture)


def write_as_coclr(file, videos, *, legacy: bool, lengths: bool):
    """CoCLR's convert_video_to_lmdb.py: keys are not in the order of writing; msgpack 0.6 does not use the bin type."""
    names = list(videos)
    order = names[1:] + names[:1]
    environment = lmdb.open(str(file), subdir=False, map_size=2**26)
    pack = {"use_bin_type": not legacy}
    keys = [b"%09d" % order.index(name) for name in names]
    with environment.begin(write=True) as transaction:
        for key, name in zip(keys, names, strict=True):
            transaction.put(key, msgpack.packb(videos[name], **pack))
        transaction.put(b"__keys__", msgpack.packb(keys, **pack))
        transaction.put(b"__len__", msgpack.packb(len(keys)))
        transaction.put(b"__order__", msgpack.packb(order, **pack))
        if lengths:
            transaction.put(b"__vlen__", msgpack.packb([len(videos[name]) for name in names]))
    environment.close()
    return file


@pytest.fixture(scope="module")
def videos() -> dict[str, list[bytes]]:
    return {name: pictures(i, count) for i, (name, count) in enumerate(LENGTHS.items())}


@given(
    st.lists(st.binary(max_size=70) | st.sampled_from([b"x" * 255, b"y" * 256, b"z" * 70_000]), max_size=40),
    st.booleans(),
)
def test_spans_are_what_msgpack_reads(record, modern):
    packed = msgpack.packb(record, use_bin_type=modern)
    spans = msgpack_spans(packed)
    assert spans.dtype == np.uint64 and spans.shape == (len(record), 2)
    assert [packed[offset : offset + size] for offset, size in spans.tolist()] == record


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (b"", "reaches beyond the 0 bytes"),
        (msgpack.packb({"a": 1}), "expected a msgpack array"),
        (msgpack.packb([b"a", 3]), "expected msgpack bytes at byte 4"),
        (msgpack.packb([b"abc", b"def"])[:-1], "element at byte 6 reaches beyond the 10 bytes"),
        (msgpack.packb([b"abc"])[:2], "reaches beyond the 2 bytes"),
        (b"\xdd\xff\xff\xff\xff", "4294967295 elements does not fit 5 bytes"),
    ],
)
def test_a_damaged_record_is_named(packed, message):
    with pytest.raises(ValueError, match=message):
        msgpack_spans(packed)


@pytest.mark.parametrize("lengths", [True, False])
@pytest.mark.parametrize("legacy", [True, False])
def test_every_form_of_the_published_files_is_read(tmp_path, videos, legacy, lengths):
    file = write_as_coclr(tmp_path / "x.lmdb", videos, legacy=legacy, lengths=lengths)
    records = open_records(file)
    assert sorted(records.names) == sorted(LENGTHS) and records.num_frames() == LENGTHS
    for name in ("Zumba/v_Zumba_g01_c01", "Archery/Day_#_2"):
        path = record_path(file, name)
        assert split_record(path) == (file, name)
        assert frame_size(path) == (LENGTHS[name], 24, 33)
        frames = [0, 3, 4, LENGTHS[name] - 1]
        expected = np.stack([by_pil(videos[name][i]) for i in frames])
        np.testing.assert_array_equal(read_record_frames(path, frames, "rgb"), expected)
        np.testing.assert_array_equal(read_record_frames(path, frames, "flow"), expected[..., [2, 1]])
        luma = np.stack([luma_by_pil(videos[name][i]) for i in frames])
        np.testing.assert_array_equal(read_record_frames(path, frames, "gray"), luma)
        assert [bytes(part) for part in read_jpegs(path, frames)] == [videos[name][i] for i in frames]


def test_what_is_written_is_what_coclr_writes(tmp_path, videos):
    with RecordWriter(tmp_path / "ours.lmdb") as writer:
        for name, frames in videos.items():
            writer.put(name, frames)
        assert writer.num_frames == LENGTHS
    assert [path.name for path in tmp_path.iterdir()] == ["ours.lmdb"]
    options = {"subdir": False, "readonly": True, "lock": False}
    with lmdb.open(str(tmp_path / "ours.lmdb"), **options) as environment, environment.begin() as transaction:
        stored = {bytes(key): value for key, value in transaction.cursor()}
    checksums = [stored.pop(b"__crc32__%09d" % place) for place in range(4)]  # ours; readers of the format ignore them
    expected = [b"".join(crc32(jpeg).to_bytes(4, "little") for jpeg in video) for video in videos.values()]
    # Padded, so that LMDB keeps them outside of the pages that are read when the file is opened.
    assert checksums == [value.ljust(2040, b"\0") for value in expected]
    read = {key: msgpack.unpackb(value) for key, value in stored.items()}
    assert read.pop(b"__order__") == list(videos) and read.pop(b"__len__") == 4
    assert read.pop(b"__vlen__") == list(LENGTHS.values()) and read.pop(b"__keys__") == list(read)
    assert list(read.values()) == list(videos.values())


def test_a_file_larger_than_the_first_map_and_a_run_that_was_killed(tmp_path, monkeypatch):
    file, blob = tmp_path / "deep" / "big.lmdb", b"x" * 2**18
    real_open = lmdb.open
    monkeypatch.setattr(
        "lmdb.open", lambda *a, **k: real_open(*a, **(k | {"map_size": 2**20} if "map_size" in k else k))
    )
    with pytest.raises(KeyboardInterrupt), RecordWriter(file) as writer:
        for i in range(5):
            writer.put(f"c/{i}", [blob, b""])
        raise KeyboardInterrupt
    assert not file.exists()
    with RecordWriter(file) as writer:
        assert writer.num_frames == {f"c/{i}": 2 for i in range(5)}
        for i in range(5, 9):
            writer.put(f"c/{i}", [blob, b"end"])
    assert open_records(file).num_frames() == {f"c/{i}": 2 for i in range(9)}
    assert [bytes(jpeg) for jpeg in read_jpegs(record_path(file, "c/8"), [1, 0])] == [b"end", blob]


def test_a_full_disk_names_the_file_and_what_is_kept(tmp_path):
    file, blob = tmp_path / "full.lmdb", np.random.default_rng(0).bytes(2**18)
    message = r"could not write '.*full.lmdb.part': Input/output error; 1 video is complete in it, and the same command"
    with files_end_at(2**17), pytest.raises(InputError, match=message), RecordWriter(file) as writer:
        writer.put("c/0", [b"small"])
        writer.put("c/1", [blob])
    assert not file.exists()
    with RecordWriter(file) as writer:
        assert writer.num_frames == {"c/0": 1}
        writer.put("c/1", [blob])
    message = "could not write '.*full.lmdb.copy': File too large; 'full.lmdb' is untouched"
    with files_end_at(2**17), pytest.raises(InputError, match=message), RecordWriter(file) as writer:
        writer.put("c/2", [b"small"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full.lmdb"]
    assert open_records(file).num_frames() == {"c/0": 1, "c/1": 1}


def test_a_memory_map_that_cannot_grow_is_named(tmp_path, monkeypatch):
    """As under `ulimit -v`: the map must be doubled for the second video, but no address space is left."""

    class Small:
        def __init__(self, *arguments, **options):
            self._real = real(*arguments, **options | {"map_size": 2**20})

        def __getattr__(self, name):
            return getattr(self._real, name)

        def set_mapsize(self, size):
            raise lmdb.MemoryError(f"mdb_env_set_mapsize: Cannot allocate memory ({size})")

    real = lmdb.open
    message = r"could not write '.*a.lmdb.part': Cannot allocate memory \(2097152\); 1 video is complete in it, and the"
    with monkeypatch.context() as patch:
        patch.setattr("lmdb.open", Small)
        with pytest.raises(InputError, match=message), RecordWriter(tmp_path / "a.lmdb") as writer:
            writer.put("c/0", [b"small"])
            writer.put("c/1", [b"x" * 2**20])
    with RecordWriter(tmp_path / "a.lmdb") as writer:
        assert writer.num_frames == {"c/0": 1}
        writer.put("c/1", [b"x" * 2**20])


def contents(file) -> dict[str, list[bytes]]:
    """Returns what CoCLR's reader finds: for each name, the JPEGs of the record whose key is the position of the
    name.
    """
    options = {"subdir": False, "readonly": True, "lock": False}
    with lmdb.open(str(file), **options) as environment, environment.begin() as transaction:
        order = msgpack.unpackb(transaction.get(b"__order__"), raw=True)
        found = {n.decode(): msgpack.unpackb(transaction.get(b"%09d" % i), raw=True) for i, n in enumerate(order)}
        lengths = msgpack.unpackb(transaction.get(b"__vlen__"))
        assert msgpack.unpackb(transaction.get(b"__keys__")) == [b"%09d" % i for i in range(len(order))]
        published = [key for key in transaction.cursor().iternext(values=False) if not key.startswith(b"__crc32__")]
        assert msgpack.unpackb(transaction.get(b"__len__")) == len(order) == len(published) - 4
        assert lengths == [len(jpegs) for jpegs in found.values()]
    return found


@pytest.mark.parametrize("lengths", [True, False])
@pytest.mark.parametrize("legacy", [True, False])
def test_a_finished_file_is_continued_in_a_copy(tmp_path, videos, legacy, lengths):
    """Processes that have the file open can continue to read it; a run that is killed at any time leaves it
    complete.
    """
    file = write_as_coclr(tmp_path / "x.lmdb", videos, legacy=legacy, lengths=lengths)
    reader = open_records(file)
    with RecordWriter(file) as writer:
        assert writer.num_frames == LENGTHS
    with pytest.raises(KeyboardInterrupt), RecordWriter(file) as writer:
        writer.put("Zumba/new", [b"new"])
        raise KeyboardInterrupt
    assert open_records(file) is reader and "Zumba/new" not in reader.names
    with RecordWriter(file) as writer:
        assert writer.num_frames == LENGTHS | {"Zumba/new": 1}
        writer.put("Archery/one", [b"other", b"length"])
    assert bytes(reader.record("Archery/one")[0]) == msgpack.packb(videos["Archery/one"], use_bin_type=not legacy)
    assert reader.num_frames() == LENGTHS
    del reader  # LMDB can open a path only once in a process
    expected = videos | {"Archery/one": [b"other", b"length"], "Zumba/new": [b"new"]}
    assert contents(file) == expected
    assert [bytes(part) for part in read_jpegs(record_path(file, "Archery/one"), [1])] == [b"length"]
    assert {path.name for path in tmp_path.iterdir()} == {"x.lmdb", "x.lmdb-lock"}  # LMDB's writer made the lock file


def test_a_run_killed_before_the_rename_is_continued(tmp_path, videos, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("cpr_fast.data.storage.record_writer.os.replace", killed)
        with pytest.raises(KeyboardInterrupt), RecordWriter(tmp_path / "x.lmdb") as writer:
            writer.put("a/one", [b"1"])
    with RecordWriter(tmp_path / "x.lmdb") as writer:
        assert writer.num_frames == {"a/one": 1}
        writer.put("a/two", [b"2"])
    assert contents(tmp_path / "x.lmdb") == {"a/one": [b"1"], "a/two": [b"2"]}


def test_two_writers_of_one_file(tmp_path):
    with (
        RecordWriter(tmp_path / "x.lmdb"),
        pytest.raises(InputError, match=r"another process is writing .*x.lmdb' \(process \d+"),
    ):
        RecordWriter(tmp_path / "x.lmdb")


def test_two_paths_to_one_file(tmp_path, videos):
    file = write_as_coclr(tmp_path / "x.lmdb", {"a/b": pictures(0, 1)}, legacy=True, lengths=True)
    (tmp_path / "link.lmdb").symlink_to(file)
    assert open_records(tmp_path / "link.lmdb") is open_records(file) is open_records(tmp_path / "x.lmdb")


def test_threads_read_the_same(tmp_path, videos):
    file = write_as_coclr(tmp_path / "x.lmdb", videos, legacy=True, lengths=True)
    path, name = record_path(file, "Archery/Day_#_2"), "Archery/Day_#_2"

    def same(seed):
        frames = np.sort(np.random.default_rng(seed).choice(300, 9, replace=False))
        return [bytes(part) for part in read_jpegs(path, frames)] == [videos[name][i] for i in frames]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(same, range(8)))


class TestBadFiles:
    def test_files_that_are_none(self, tmp_path):
        with pytest.raises(InputError, match="gone.lmdb' does not exist"):
            open_records(tmp_path / "gone.lmdb")
        (tmp_path / "text.lmdb").write_text("no database " * 1000)
        with pytest.raises(InputError, match="text.lmdb"):
            open_records(tmp_path / "text.lmdb")
        with lmdb.open(str(tmp_path / "other.lmdb"), subdir=False) as environment, environment.begin(write=True) as t:
            t.put(b"a", b"b")
        with pytest.raises(InputError, match="expected the key '__order__'"):
            open_records(tmp_path / "other.lmdb")
        with pytest.raises(InputError, match="ends in .lmdb, got '.*records'"):
            RecordWriter(tmp_path / "records")

    @pytest.mark.parametrize("view", ["rgb", "flow", "gray"])
    def test_a_region_is_part_of_the_frames(self, tmp_path, view):
        path = record_path(
            write_as_coclr(tmp_path / "x.lmdb", {"a/b": pictures(0, 3)}, legacy=False, lengths=True), "a/b"
        )
        whole = read_record_frames(path, [0, 2], view)
        for top, left, bottom, right in ((0, 0, 24, 33), (3, 5, 24, 32), (23, 0, 24, 1)):
            part = read_record_frames(path, [0, 2], view, Region((top, left, bottom, right), 24, 33))
            np.testing.assert_array_equal(part, whole[:, top:bottom, left:right])
        with pytest.raises(VideoError, match="decodes to 33x24, the index says 33x25"):
            read_record_frames(path, [0], view, Region.whole(25, 33))

    @pytest.mark.parametrize(
        ("view", "said"),
        [("rgb", "holds 3 frames, the index says 5: "), ("flow", "holds 3 fields of flow, the index says 6 frames: ")],
    )
    def test_fewer_frames_than_the_index_says(self, tmp_path, view, said):
        """Every read says so, whichever frames it wants."""
        path = record_path(
            write_as_coclr(tmp_path / "x.lmdb", {"a/b": pictures(0, 3)}, legacy=False, lengths=True), "a/b"
        )
        with pytest.raises(VideoError, match=said):
            list(read_parts(path, [0, 1], view, 5))
        assert len(joined(read_parts(path, [0, 1], view, 3), 2)) == 2
        require_frames(path, view, 2)  # fewer than the record has are never read

    def test_videos_that_are_not_there_or_damaged(self, tmp_path):
        good = pictures(0, 3)
        file = write_as_coclr(
            tmp_path / "x.lmdb",
            {"a/cut": [good[0], good[1][:200]], "a/text": [b"text"], "a/size": [good[0], jpeg(1, 26, 33)],
             "a/smaller": [good[0], jpeg(1, 20, 30)], "a/empty": []},
            legacy=False, lengths=True,
        )  # fmt: skip
        for name, frames, message in [
            ("a/none", [0], "no video 'a/none'"),
            ("a/cut", [0, 1], "frame 1 does not decode"),
            ("a/cut", [0, 2], "the record holds 2 frames, the index says 3 or more"),
            ("a/text", [0], "frame 0 does not decode"),
            ("a/size", [0, 1], "frame"),
            ("a/smaller", [0, 1], r"the frame size changes from \(24, 33\) to \(20, 30\)"),
            ("a/empty", [0], "the record holds no frame"),
        ]:
            for view in ("rgb", "flow", "gray"):
                with pytest.raises(VideoError, match=message) as caught:
                    read_record_frames(record_path(file, name), frames, view)
                assert caught.value.path == record_path(file, name)
        assert read_record_frames(record_path(file, "a/cut"), [0], "rgb").shape == (1, 24, 33, 3)
        with pytest.raises(VideoError, match="no JPEG"):
            frame_size(record_path(file, "a/text"))
