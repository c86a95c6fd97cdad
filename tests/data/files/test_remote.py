"""Videos, tar files and pictures on an HTTP server and on S3: the same bytes, read by ranges, and named failures."""

from __future__ import annotations

import asyncio
import errno
import threading
from pathlib import Path

import numpy as np
import pytest
from support.data_sets.tar_files import write_tar
from support.machine.full_disk import files_end_at
from support.machine.http_server import serving
from support.machine.new_process import as_a_new_process
from support.videos.odd_videos import write_plain

from cpr_fast.config import DataConfig
from cpr_fast.data.clips.loader import TrainLoader
from cpr_fast.data.files import remote
from cpr_fast.data.files.access import storage_of
from cpr_fast.data.files.names import member_path
from cpr_fast.data.files.remote import RemoteStorage, remote_files
from cpr_fast.data.files.tar import TarStorage, members
from cpr_fast.data.index.build import IndexOptions, write_index
from cpr_fast.data.index.index import Index
from cpr_fast.data.storage.unreadable import Unreadable
from cpr_fast.data.video.container import VideoError
from cpr_fast.data.video.decode import read_frames
from cpr_fast.data.video.packets import slice_packets
from cpr_fast.data.video.transcode import transcode_video
from cpr_fast.errors import InputError

fsspec = pytest.importorskip("fsspec", reason="fsspec is an extra: pip install fsspec aiohttp")
pytest.importorskip("fsspec.asyn", reason="fsspec is an extra: pip install fsspec aiohttp")
pytest.importorskip("aiohttp", reason="aiohttp is an extra: pip install fsspec aiohttp")

BIG = 3 * 2**20


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    return write_plain(tmp_path_factory.mktemp("video") / "v.mp4", 30)


@pytest.fixture
def server():
    noise = np.random.default_rng(0).integers(0, 256, BIG, np.uint8).tobytes()
    with serving({"/noise": noise}) as served:
        yield served


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    monkeypatch.setattr(remote, "PAUSES_S", (0.01, 0.01, 0.01))


def at(server, name: str) -> Path:
    return Path(f"{server.url}{name}")


def test_ranges_hold_the_bytes_of_the_object_and_no_others_are_sent(server):
    storage, path, noise = RemoteStorage(), at(server, "/noise"), server.files["/noise"]
    assert storage.size(path) == BIG and storage.version(path) == storage.version(path)
    for start, length in ((0, 1), (100, 1000), (BIG - 5, 100), (BIG, 3), (BIG // 2, 2**20)):
        assert storage.read_range(path, start, length) == noise[start : start + length]
    assert server.sent["/noise"] == 1 + 1000 + 5 + 2**20
    with storage.open(path) as file:
        assert file.seek(-4, 2) and file.read() == noise[-4:]
        file.seek(0)
        assert file.read() == noise


def test_many_threads_read_one_object(server):
    storage, path, noise = RemoteStorage(), at(server, "/noise"), server.files["/noise"]
    starts = np.random.default_rng(1).integers(0, BIG - 5000, 64).tolist()
    found: dict[int, bytes] = {}

    def read(start: int) -> None:
        found[start] = storage.read_range(path, start, 5000)

    threads = [threading.Thread(target=read, args=[start]) for start in starts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[start] == noise[start : start + 5000] for start in starts)


def test_failures_that_pass_are_tried_again_and_others_are_not(server):
    storage, path, noise = RemoteStorage(), at(server, "/noise"), server.files["/noise"]
    storage.size(path)
    server.faults["/noise"] = [503, "cut", 500, None]
    assert storage.read_range(path, 7, 1000) == noise[7:1007] and server.requests["/noise"] == 4
    for fault, number, reason, requests in (
        (503, errno.EAGAIN, r"could not be read in 4 attempts; the last: the server answered 503", 4),
        ("cut", errno.EAGAIN, r"could not be read in 4 attempts; the last: ", 4),
        (403, errno.EACCES, r"the server refuses it \(403\): has the URL expired", 1),
        (404, errno.ENOENT, "does not exist on the server", 1),
        (418, errno.EIO, "the server answered 418", 1),
    ):
        server.faults["/noise"], server.requests["/noise"] = [fault], 0
        with pytest.raises(OSError, match=reason) as failed:
            storage.read_range(path, 1007, 1000)
        assert failed.value.errno == number and server.requests["/noise"] == requests


@pytest.mark.parametrize(
    ("fault", "slow_s", "limit", "limit_s", "said"),
    [
        ("slow", 0.3, "ANSWER_S", 0.1, "could not be read in 4 attempts; the last: no answer in 0.1 s"),
        ("trickle", 0.05, "WHOLE_S", 0.2, "attempts; the last: no answer in 30 s, or no whole one in 0.2 s"),
    ],
)
def test_a_server_that_is_silent_or_sends_a_byte_now_and_then_is_not_waited_for(
    server, monkeypatch, fault, slow_s, limit, limit_s, said
):
    monkeypatch.setattr(remote, limit, limit_s)
    server.slow_s, path = slow_s, at(server, "/noise")
    server.faults["/noise"] = [fault, None]
    assert RemoteStorage().read_range(path, 7, 1000) == server.files["/noise"][7:1007]
    server.faults["/noise"] = [fault]
    with pytest.raises(OSError, match=said):
        RemoteStorage().read_range(path, 7, 1000)


def test_a_store_that_never_answers_is_not_waited_for(monkeypatch):
    class Silent(fsspec.asyn.AsyncFileSystem):
        """A store whose answers begin and do not end, whatever its own limits are."""

        protocol, asked = "silent", []

        async def _info(self, path: str, **_) -> dict:
            self.asked.append("info")
            await asyncio.sleep(3600 if path.endswith("gone") else 0)
            return {"name": path, "size": 9, "type": "file"}

        async def _cat_file(self, path: str, start=None, end=None, **_) -> bytes:
            self.asked.append((start, end))
            await asyncio.sleep(3600)

    fsspec.register_implementation("silent", Silent, clobber=True)
    monkeypatch.setattr(remote, "WHOLE_S", 0.05)
    for name, asked in (("a", ["info", *4 * [(2, 5)]]), ("gone", 4 * ["info"])):
        Silent.asked.clear()
        with pytest.raises(OSError, match="attempts; the last: no answer in 30 s, or no whole one in 0.05 s"):
            RemoteStorage().read_range(Path(f"silent://h/{name}"), 2, 3)
        assert Silent.asked == asked


def test_a_long_range_is_read_in_requests_of_bounded_length(server, monkeypatch):
    monkeypatch.setattr(remote, "MOST_BYTES", 2**20)
    storage, path = RemoteStorage(), at(server, "/noise")
    assert storage.read_range(path, 5, BIG - 6) == server.files["/noise"][5:-1]
    assert server.requests["/noise"] == 3 and server.sent["/noise"] == BIG - 6
    assert storage.fetch_range(path, 9, 0) == b""


def test_an_object_that_cannot_be_opened_is_named(server):
    server.faults["/gone"] = [403]
    for name, reason in (("/gone", r"refuses it \(403\)"), ("/never", "does not exist on the server")):
        with pytest.raises(OSError, match=reason):
            RemoteStorage().size(at(server, name))
        with pytest.raises(VideoError, match=reason) as failed:
            read_frames(at(server, name), [0], "rgb", 3)
        assert failed.value.unreadable
    with pytest.raises(OSError, match="could not be read in 4 attempts"):
        RemoteStorage().size(Path("http://127.0.0.1:9/nobody-listens"))
    with pytest.raises(InputError, match=r"nosuch://h/a: reading it needs `pip install fsspec aiohttp s3fs`"):
        RemoteStorage().size(Path("nosuch://h/a"))


def test_a_server_that_ignores_ranges_is_named_and_never_sends_a_whole_large_object(server):
    server.ranges = False
    storage, path = RemoteStorage(), at(server, "/noise")
    with pytest.raises(OSError, match="ignores requests for ranges"):
        storage.read_range(path, 2**20, 1000)
    assert server.requests["/noise"] == 1  # not tried again


def test_a_video_on_a_server_decodes_to_the_frames_of_the_file(server, video, tmp_path):
    server.files["/a b/v.mp4"] = server.files["/bad.mp4"] = video.read_bytes()
    server.files["/bad.mp4"] = server.files["/bad.mp4"][:-2000]
    shard = write_tar(tmp_path / "s.tar", {"x": bytes(BIG), "v.mp4": video.read_bytes(), "y": bytes(BIG)})
    server.files["/s.tar"] = shard.read_bytes()
    found = list(members(at(server, "/s.tar")))
    assert [member.name for member in found] == ["x", "v.mp4", "y"] and server.sent["/s.tar"] < BIG / 4
    numbers = np.array([2, 3, 17, 29])
    truth = read_frames(video, numbers, "rgb", 30)
    for path in (at(server, "/a b/v.mp4"), member_path(found[1])):
        for _ in range(2):
            assert np.array_equal(read_frames(path, numbers, "rgb", 30), truth)
        packets, places = slice_packets(path, numbers, 30)
        assert len(packets) == len(slice_packets(video, numbers, 30)[0]) and len(places) == 4
    assert server.sent["/s.tar"] < BIG / 2  # of 6 MiB
    with pytest.raises(VideoError):
        read_frames(at(server, "/bad.mp4"), numbers, "rgb", 30)


def test_a_tar_file_on_a_server_that_changed_or_was_cut_off_is_named(server, tmp_path):
    contents = {"a.mp4": b"a" * 700, "b.mp4": b"b" * 70000}
    whole = write_tar(tmp_path / "s.tar", contents).read_bytes()
    server.files["/s.tar"] = whole
    path = member_path(list(members(at(server, "/s.tar")))[1])
    for name, data, reason in (
        ("/cut.tar", whole[:3000], "is cut off"),
        ("/new.tar", whole[1536:], "has changed since"),
    ):
        server.files[name] = data
        with pytest.raises(OSError, match=reason):
            TarStorage().size(Path(str(path).replace("/s.tar", name)))
    with pytest.raises(OSError, match="is cut off"):
        list(members(at(server, "/cut.tar")))


def test_training_reads_urls_of_a_list_as_files_and_counts_those_that_expired(server, video, tmp_path):
    names = [f"{i:02}.mp4" for i in range(8)]
    for i, name in enumerate(names):
        data = video.read_bytes() + bytes(8 * i)  # what follows the last box of an MP4 is ignored
        server.files[f"/{name}"] = data
        (tmp_path / name).write_bytes(data)
    (tmp_path / "urls.txt").write_text("".join(f"{server.url}/{name}?signature=a%2Fb\n" for name in names))
    (tmp_path / "files.txt").write_text("".join(f"{name}\n" for name in names))
    data = DataConfig(frames=8, size=32, batch_size=4, workers=2)
    batches = []
    for name in ("urls", "files"):
        write_index(tmp_path / f"{name}.txt", tmp_path / f"{name}.csv", IndexOptions("list"))
        loader = TrainLoader(Index.load(tmp_path / f"{name}.csv"), data, ["rgb"], seed=1)
        batches.append(list(loader.epoch(0)))
        loader.close()
    for far, near in zip(*batches, strict=True):
        assert np.array_equal(far.clips["rgb"], near.clips["rgb"])
    server.faults["/03.mp4"] = [403]
    as_a_new_process()
    loader = TrainLoader(Index.load(tmp_path / "urls.csv"), data, ["rgb"], seed=1)
    assert len(list(loader.epoch(0))) == 2
    ((path, reason),) = loader.skipped
    assert path.name.startswith("03.mp4") and "the server refuses it (403)" in reason
    loader.close()


def test_an_object_that_became_shorter_is_named(server):
    storage, path = RemoteStorage(), at(server, "/noise")
    storage.size(path)
    server.files["/noise"] = server.files["/noise"][:1000]
    with pytest.raises(OSError, match="the server sent 500 of 1,000 bytes"):
        storage.read_range(path, 500, 1000)


def test_a_signed_url_may_be_that_of_a_tar_file(server, video, tmp_path):
    shard = write_tar(tmp_path / "s.tar", {"run/a.mp4": video.read_bytes(), "walk/b.mp4": video.read_bytes() + b"0000"})
    server.files["/x/train-0.tar"] = shard.read_bytes()
    (tmp_path / "l.txt").write_text(f"{server.url}/x/train-0.tar?signature=a%2Fb/c&expires=1\n")
    write_index(tmp_path / "l.txt", tmp_path / "i.csv", IndexOptions("list"))
    index = Index.load(tmp_path / "i.csv")
    assert [(v.label, v.split, v.source) for v in index] == [
        ("run", "train", "train-0.tar/run/a"), ("walk", "train", "train-0.tar/walk/b")]  # fmt: skip
    assert np.array_equal(read_frames(index[1].path, [3, 20], "rgb", 30), read_frames(video, [3, 20], "rgb", 30))
    server.faults["/x/train-0.tar"] = [403]
    with pytest.raises(InputError, match=r"unreadable_shard .*refuses it \(403\): has the URL expired"):
        write_index(Path(f"{server.url}/x/train-0.tar?signature=d"), tmp_path / "n.csv", IndexOptions("tar"))


def test_what_is_held_in_memory_does_not_hide_that_a_server_refuses(server, video, tmp_path):
    shard = write_tar(tmp_path / "s.tar", {"v.mp4": video.read_bytes()})
    server.files |= {"/v.mp4": video.read_bytes(), "/s.tar": shard.read_bytes(), "/empty": b""}
    near = (video, member_path(next(members(shard))))
    far = (at(server, "/v.mp4"), member_path(next(members(at(server, "/s.tar")))))
    for path in (*near, *far, at(server, "/empty")):
        storage = storage_of(path)
        assert storage.read_range(path, 0, storage.size(path)) == (b"" if path.name == "empty" else video.read_bytes())
        storage.check(path)
    server.faults |= {"/v.mp4": [403], "/s.tar": [403]}
    for path in far:
        assert storage_of(path).read_range(path, 0, 9) == video.read_bytes()[:9]
        with pytest.raises(OSError, match=r"refuses it \(403\)"):
            storage_of(path).check(path)
    with pytest.raises(OSError, match="No such file"):
        storage_of(tmp_path / "none").check(tmp_path / "none")


def test_a_copy_of_what_is_no_readable_video_names_the_url_and_leaves_nothing(server, video, tmp_path):
    server.files |= {"/text.mp4": b"<!DOCTYPE html> " * 9, "/cut.mp4": video.read_bytes(), "/empty.mp4": b""}
    server.faults["/cut.mp4"] = ["cut"]
    for name, reason, unreadable in (
        ("/text.mp4", "is a text that begins with '<!DOCTYPE html>", False),
        ("/cut.mp4", "could not be read in 4 attempts", True),
        ("/never.mp4", "does not exist on the server", True),
        ("/empty.mp4", "does not state its size|Invalid data", False),
    ):
        with pytest.raises(VideoError, match=reason) as failed:
            transcode_video(at(server, name), tmp_path / "copies" / "v.mp4", 32)
        assert failed.value.unreadable == unreadable and failed.value.path == at(server, name)
        assert not (tmp_path / "copies").exists()


def test_a_full_disk_is_named_while_a_video_is_fetched_to_be_copied(server, video, tmp_path):
    server.files["/v.mp4"] = video.read_bytes()
    with files_end_at(100), pytest.raises(InputError, match=r"could not write '.*copies/v.mp4': File too large"):
        transcode_video(at(server, "/v.mp4"), tmp_path / "copies" / "v.mp4", 32)
    assert not (tmp_path / "copies").exists()


def test_a_server_that_is_lost_ends_the_run(tmp_path):
    with serving({f"/{i}": b"x" for i in range(20)}) as server:
        files = [at(server, f"/{i}") for i in range(20)]
        Unreadable(files).add(files[0], "does not decode")
    with pytest.raises(InputError, match=r"10 of 10 files looked for .*mount or the server"):
        Unreadable(files).add(files[0], "cannot be reached")


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """Yields the options of S3 for a bucket of a local server."""
    pytest.importorskip("s3fs", reason="s3fs is an extra: pip install s3fs")
    moto = pytest.importorskip("moto.server", reason="moto is for tests only: pip install 'moto[server]'")
    server = moto.ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b"), ("AWS_REGION", "us-east-1"),
                            ("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")):  # fmt: skip
            patch.setenv(name, value)
        import s3fs

        system = s3fs.S3FileSystem()
        system.mkdir("clips")
        yield system
    server.stop()


def test_a_prefix_of_s3_is_indexed_and_trained_on(bucket, video, tmp_path):
    for i, name in enumerate(["run/a.mp4", "run/b c.mp4", "walk/d.mp4", "walk/e.txt"]):
        bucket.pipe(f"clips/set/{name}", video.read_bytes() + bytes(8 * i))
    root = Path("s3://clips/set")
    assert remote_files(root)[1] == Path("s3://clips/set/run/b c.mp4")
    report = write_index(root, tmp_path / "i.csv", IndexOptions())
    text = (tmp_path / "i.csv").read_text()
    assert "s3://clips/set/run/b c.mp4,run,run/b c.mp4" in text and report["root"] == "s3://clips/set"
    index = Index.load(tmp_path / "i.csv")
    assert [v.label for v in index] == ["run", "run", "walk"] and report["other_files"] == {".txt": 1}
    assert np.array_equal(read_frames(index[1].path, [3, 20], "rgb", 30), read_frames(video, [3, 20], "rgb", 30))
    options = IndexOptions(transcode=tmp_path / "copies", short_side=32)
    assert write_index(root, tmp_path / "copies.csv", options)["videos"] == 3
    copies = Index.load(tmp_path / "copies.csv")
    assert [(v.path, v.label, v.num_frames) for v in copies] == [
        (tmp_path / "copies" / name, name.split("/")[0], 30) for name in ("run/a.mp4", "run/b c.mp4", "walk/d.mp4")
    ]
    with pytest.raises(OSError, match="does not exist on the server"):
        storage_of("s3://clips/x").size(Path("s3://clips/set/none.mp4"))
    with pytest.raises(InputError, match="ROOT: found no video in"):
        write_index(Path("s3://clips/none"), tmp_path / "n.csv", IndexOptions())


def test_tar_files_of_s3_are_indexed_and_read_by_ranges(bucket, video, tmp_path):
    shard = write_tar(tmp_path / "s.tar", {"a.mp4": video.read_bytes(), "a.json": b'{"label": "run"}', "b.mp4": b"no"})
    bucket.pipe("clips/shards/train-0.tar", shard.read_bytes())
    report = write_index(Path("s3://clips/shards"), tmp_path / "i.csv", IndexOptions("tar"))
    (row,) = Index.load(tmp_path / "i.csv")
    assert (row.label, row.split, report["counts"]) == ("run", "train", {"broken": 1})
    assert np.array_equal(read_frames(row.path, [3, 20], "rgb", 30), read_frames(video, [3, 20], "rgb", 30))
