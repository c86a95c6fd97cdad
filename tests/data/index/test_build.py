"""Indexes of data sets: classes and siblings of every layout, reports of unusual files, resumed runs, transcoding."""

import json
import os
import shutil
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from support.numbered_videos import KINDS, decode_linearly, numbers_shown, shared_data, write_numbered
from support.videos.odd_videos import place

import cpr_fast.data.index.build as build
from cpr_fast.cli import main
from cpr_fast.data.index.build import IndexOptions, write_index
from cpr_fast.data.index.index import Index
from cpr_fast.data.index.layouts import HMDB51_CLASSES, clip_source
from cpr_fast.data.index.probing import Journal
from cpr_fast.data.index.summary import report_path
from cpr_fast.data.storage.record_writer import RecordWriter
from cpr_fast.data.storage.records import read_jpegs
from cpr_fast.data.video.probe import probe_video
from cpr_fast.errors import InputError


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return write_numbered(tmp_path_factory.mktemp("clip") / "clip", 30)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def make(tmp_path: Path, root: Path, **options) -> tuple[Index, dict]:
    report = write_index(root, tmp_path / "index.csv", IndexOptions(**options))
    return Index.load(tmp_path / "index.csv"), report


def rows(index: Index) -> list[tuple[str, str, str, str]]:
    return [(video.path.stem, video.label, video.source, video.split) for video in index]


class TestHMDB51:
    NAMES = {
        "wave": ["20060723sfjffbartsinger_wave_f_cm_np1_ba_med_0", "20060723sfjffbartsinger_wave_f_cm_np1_ba_med_1"],
        "brush_hair": ["Brushing_Her_Hair__[_NEW_AUDIO_]_UPDATED!!!!_brush_hair_h_cm_np1_fr_goo_0", "unused_0"],
        "cartwheel": ["Goalkeeper_Training_Day_#_2_cartwheel_f_cm_np1_ba_bad_3"],
    }

    @pytest.fixture
    def root(self, tmp_path, clip):
        for label, names in self.NAMES.items():
            place(clip, *(tmp_path / "videos" / label / f"{name}.mp4" for name in names))
            use = [1 if label == "wave" else 2] + [2] * (len(names) - 1)
            lines = [f"{name}.avi {0 if 'unused' in name else u} \n" for name, u in zip(names, use, strict=True)]
            write(tmp_path / "lists" / f"{label}_test_split2.txt", "".join(lines))
        return tmp_path / "videos"

    def test_lists_siblings_and_both_orders(self, tmp_path, root):
        index, report = make(tmp_path, root, layout="hmdb51", splits=tmp_path / "lists", split=2)
        assert index.classes == ["brush_hair", "cartwheel", "wave"] and report["splits"] == {"test": 3, "train": 1}
        singer = "wave/20060723sfjffbartsinger"
        assert [video.source for video in index][2:] == [singer, singer]
        assert index[0].source == "brush_hair/Brushing_Her_Hair__[_NEW_AUDIO_]_UPDATED!!!!"
        assert "unused_0" not in {video.path.stem for video in index}
        write(tmp_path / "lists" / "sit_test_split2.txt", "x_sit_f_cm_np1_ba_med_0.avi 1\n")
        place(tmp_path / "videos/wave" / f"{self.NAMES['wave'][0]}.mp4", root / "sit/x_sit_f_cm_np1_ba_med_0.mp4")
        for order, expected in {"official": ["brush_hair", "cartwheel", "sit", "wave"], "alphabetical": None}.items():
            index, _ = make(tmp_path, root, layout="hmdb51", splits=tmp_path / "lists", split=2, class_order=order)
            assert index.classes == (expected or sorted(index.classes))

    def test_the_official_order_is_not_the_alphabets(self):
        assert len(set(HMDB51_CLASSES)) == 51 and sorted(HMDB51_CLASSES) != HMDB51_CLASSES
        lists = shared_data("splits", "hmdb51_official_7030")
        assert {file.name.removesuffix("_test_split1.txt") for file in lists.glob("*split1.txt")} == set(HMDB51_CLASSES)

    def test_the_real_lists_name_all_that_is_missing(self, tmp_path, root):
        splits = shared_data("splits", "hmdb51_official_7030")
        _, report = make(tmp_path, root, layout="hmdb51", splits=splits, split=1)
        assert report["videos"] + report["counts"]["missing"] == 3570 + 1530

    def test_bad_lists(self, tmp_path, root):
        write(tmp_path / "bad" / "wave_test_split1.txt", "a.avi 3\n")
        with pytest.raises(InputError, match=r"wave_test_split1.txt:1: expected 0 .* got '3'"):
            make(tmp_path, root, layout="hmdb51", splits=tmp_path / "bad")
        with pytest.raises(InputError, match="expected files <class>_test_split3.txt"):
            make(tmp_path, root, layout="hmdb51", splits=tmp_path / "bad", split=3)


class TestKinetics:
    IDS = ("---QUuC4vJs", "--3ouPhoy2A", "--4-0ihtnBU")

    @pytest.fixture
    def root(self, tmp_path, clip):
        root = tmp_path / "k"
        place(clip, root / "train" / "yoga" / f"{self.IDS[0]}_000084_000094.mp4", root / f"{self.IDS[1]}.webm.mp4")
        place(clip, root / "val" / f"{self.IDS[1]}.mp4", root / f"{self.IDS[0]}_000100_000110.mp4")
        head = "label,youtube_id,time_start,time_end,split\n"
        write(
            tmp_path / "csv" / "train.csv",
            head + f'yoga,{self.IDS[0]},84,94,train\n"air drumming",{self.IDS[0]},100.0,110,train\n',
        )
        write(
            tmp_path / "csv" / "validate.csv",
            head + f"abseiling,{self.IDS[1]},20,30,validate\nyoga,{self.IDS[2]},1,11,validate\n",
        )
        return root

    def test_csv_lists_siblings_by_id(self, tmp_path, root):
        index, report = make(tmp_path, root, layout="kinetics", splits=tmp_path / "csv")
        assert [(v.label, v.source, v.split) for v in index] == [
            ("abseiling", self.IDS[1], "val"), ("air drumming", self.IDS[0], "train"), ("yoga", self.IDS[0], "train"),
        ]  # fmt: skip
        assert report["counts"]["missing"] == 1 and "validate.csv:3" in report["problems"][0]["reason"]

    @pytest.mark.parametrize("number", ["400", "600", "700"])
    def test_label_maps_give_the_order(self, tmp_path, root, number):
        shutil.copy(shared_data("splits", "kinetics_maps", f"label_map_k{number}.txt"), tmp_path / "csv")
        names = (tmp_path / "csv" / f"label_map_k{number}.txt").read_text().splitlines()
        index, _ = make(tmp_path, root, layout="kinetics", splits=tmp_path / "csv")
        assert index.classes == sorted(["abseiling", "air drumming", "yoga"], key=names.index)
        assert len(names) == int(number)

    def test_bad_lists(self, tmp_path, root):
        write(tmp_path / "csv" / "label_map.txt", "yoga\nabseiling\n")
        with pytest.raises(InputError, match="no label map .* has the classes air drumming"):
            make(tmp_path, root, layout="kinetics", splits=tmp_path / "csv")
        write(tmp_path / "csv" / "test.csv", "youtube_id,split\nx,test\n")
        with pytest.raises(InputError, match="test.csv:1: missing column time_start, time_end"):
            make(tmp_path, root, layout="kinetics", splits=tmp_path / "csv")


def test_coclr_lists_for_videos_and_for_lmdb(tmp_path, clip):
    """Uses the same lists for files and for the published LMDB; the flow has another length than the RGB video."""
    names = {"Zumba": ["v_Zumba_g01_c01", "v_Zumba_g01_c02"], "Archery": ["v_Archery_g02_c01"]}
    lists = tmp_path / "lists"
    folder = "/users/htd/beegfs/DATA/UCF101/frame"
    write(lists / "train_split01.csv", "".join(f"{folder}/Zumba/{name}/,30\n" for name in names["Zumba"]))
    write(
        lists / "test_split01.csv", f"{folder}/Archery/v_Archery_g02_c01/,30\n{folder}/Archery/v_Archery_g09_c01/,9\n"
    )
    write(lists / "ClassInd.txt", "Zumba\nArchery\n")
    expected = [("v_Zumba_g01_c01", "Zumba", "v_Zumba_g01", "train"),
                ("v_Zumba_g01_c02", "Zumba", "v_Zumba_g01", "train"),
                ("v_Archery_g02_c01", "Archery", "v_Archery_g02", "test")]  # fmt: skip
    place(clip, *(tmp_path / "videos" / f"{name}.mp4" for group in names.values() for name in group))
    index, report = make(tmp_path, tmp_path / "videos", layout="coclr", splits=lists)
    assert rows(index) == expected and report["counts"] == {"missing": 1}

    jpegs = [av_jpeg(frame) for frame in decode_linearly(clip)]
    for kind, lengths in {"rgb": (30, 25, 30), "flow": (29, 20, 40)}.items():
        with RecordWriter(tmp_path / f"{kind}.lmdb") as writer:
            for (label, name), frames in zip([(k, n) for k in names for n in names[k]], lengths, strict=True):
                writer.put(f"{label}/{name}", (jpegs * 2)[:frames])
    index, _ = make(tmp_path, tmp_path / "rgb.lmdb", layout="lmdb", splits=lists, flow_lmdb=tmp_path / "flow.lmdb")
    assert rows(index) == expected and [video.num_frames for video in index] == [30, 21, 30]
    assert all(read_jpegs(video.flow_path, [video.num_frames - 2]) for video in index)
    assert [(video.width, video.height) for video in index] == [(64, 48)] * 3
    without_lists, _ = make(tmp_path, tmp_path / "rgb.lmdb", layout="lmdb")
    assert without_lists.classes == ["Archery", "Zumba"] and without_lists[1].source == "v_Zumba_g01"
    write(lists / "test_split01.csv", "no list\n")
    with pytest.raises(InputError, match=r"test_split01.csv:1: expected <folders>/<class>/<video>/,<frames>"):
        make(tmp_path, tmp_path / "videos", layout="coclr", splits=lists)


def av_jpeg(picture: np.ndarray) -> bytes:
    import simplejpeg

    return simplejpeg.encode_jpeg(np.ascontiguousarray(picture), quality=95)


def test_sources_by_name():
    assert clip_source("Archery", "v_Archery_g02_c05") == "v_Archery_g02"
    assert clip_source("sit", "April_09_sit_u_nm_np1_ba_goo_0") == "sit/April_09"
    assert clip_source("yoga", "---QUuC4vJs_000084_000094") == "---QUuC4vJs"
    assert clip_source("x", "anything") == "x/anything" != clip_source("y", "anything")
    assert clip_source("HandstandPushups", "v_HandStandPushups_g01_c01") == "v_HandStandPushups_g01"


class TestReport:
    def test_odd_files_are_named_and_not_fatal(self, tmp_path, clip):
        root = tmp_path / "set" / "a"
        place(clip, root / "good.mp4")
        write_numbered(root / "short", 5)
        (root / "empty.mp4").touch()
        write(root / "text.avi", "not a video")
        whole = write_numbered(root / "whole", 40, "mjpeg-avi")
        cut = root / "cut.avi"
        cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        write_variable_rate(root / "vfr.mkv")
        shutil.copy(shared_data("tiny", "rotated_90.mov"), root / "turned.mov")
        for verify in (True, False):
            index, report = make(tmp_path, tmp_path / "set", verify=verify)
            kinds = {Path(problem["path"]).name: problem["kind"] for problem in report["problems"]}
            kinds.pop("cut.avi", None)  # the packets alone do not show that
            assert kinds == {"short.mp4": "short", "empty.mp4": "empty", "text.avi": "broken",
                             "vfr.mkv": "variable_rate", "turned.mov": "rotated"}  # fmt: skip
            assert sorted(v.path.name for v in index) == ["cut.avi", "good.mp4", "short.mp4", "vfr.mkv", "whole.avi"]
            assert report["verified"] is verify and report["files_per_s"] > 0
            assert json.loads(report_path(tmp_path / "index.csv").read_text()) == report
        assert {v.path.name: v.num_frames for v in index} | {"cut.avi": 0} == {
            "cut.avi": 0, "good.mp4": 30, "short.mp4": 5, "vfr.mkv": 30, "whole.avi": 40}  # fmt: skip
        index, report = make(tmp_path, tmp_path / "set", min_frames=6)
        assert report["counts"]["too_short"] == 1 and "short.mp4" not in {v.path.name for v in index}

    @pytest.mark.parametrize("kind", KINDS)
    def test_packets_count_what_decodes(self, tmp_path, kind):
        path = write_numbered(tmp_path / kind, 47, kind)
        assert probe_video(path, decode=False) == probe_video(path)

    def test_packets_of_real_clips(self):
        """XviD with packed B-frames may contain one packet more or less; everything else is exact."""
        for path in (*sorted(shared_data("ucf101_100").glob("*/*.avi"))[::20], *shared_data("tiny").glob("*.mkv")):
            quick, whole = probe_video(path, decode=False), probe_video(path)
            assert abs(quick.num_frames - whole.num_frames) <= (2 if path.suffix == ".avi" else 0), path
            assert (quick.width, quick.height, quick.fps) == (whole.width, whole.height, whole.fps)

    def test_the_command_prints_the_report(self, tmp_path, clip, capsys):
        place(clip, tmp_path / "set" / "a" / "v.mp4")
        (tmp_path / "set" / "a" / "empty.mp4").touch()
        assert main(["index", str(tmp_path / "set"), "--out", str(tmp_path / "i.csv"), "--no-verify", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["videos"] == 1 and report["counts"] == {"empty": 1} and not report["verified"]


class TestJournal:
    @pytest.fixture
    def root(self, tmp_path, clip):
        place(clip, *(tmp_path / "set" / "a" / f"v{i}.mp4" for i in range(7)))
        return tmp_path / "set"

    def test_a_stopped_run_goes_on(self, tmp_path, root, monkeypatch):
        real, seen = build.probe, []

        def stopping(path, **options):
            seen.append(path)
            if len(seen) == 4:
                raise KeyboardInterrupt
            return real(path, **options)

        monkeypatch.setattr("os.cpu_count", lambda: 1)
        monkeypatch.setattr(build, "probe", stopping)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path, root)
        assert not (tmp_path / "index.csv").exists()
        with (tmp_path / "index.probe.jsonl").open("a") as journal:
            journal.write('\n{"path": "half a li')
        os.utime(root / "a" / "v0.mp4", (1, 1))  # changed since the first run
        index, report = make(tmp_path, root)
        assert len(index) == 7 and report["probed"] == 5  # v0 again, and v3 .. v6
        assert sorted(path.name for path in tmp_path.iterdir()) == ["index.csv", "index.report.json", "set"]

    def test_results_of_another_version_and_damaged_lines_are_probed_again(self, tmp_path, root):
        file, path = tmp_path / "j.jsonl", root / "a" / "v0.mp4"
        Journal(file, "task").add(path, build.probe(path, verify=False))
        fresh = Journal(None, "task")
        fresh.read([file])
        assert not fresh.wants(path)
        file.write_bytes(file.read_bytes().replace(b'"num_frames"', b'"frames"') + b"\xff\xfe\n[]\n")
        older = Journal(None, "task")
        older.read([file])
        assert older.wants(path)

    def test_shards_share_the_work_and_the_last_writes_the_index(self, tmp_path, root):
        reports = [write_index(root, tmp_path / "s.csv", IndexOptions(shard=(i, 3))) for i in (2, 0, 1)]
        assert [report["probed"] for report in reports] == [2, 3, 2]
        assert [report["index"] for report in reports] == [None, None, str(tmp_path / "s.csv")]
        assert [report.get("left") for report in reports] == [5, 2, None]
        whole, _ = make(tmp_path, root)
        assert (tmp_path / "s.csv").read_text() == (tmp_path / "index.csv").read_text() and len(whole) == 7
        with pytest.raises(InputError, match=r"--shard: expected i/n"):
            write_index(root, tmp_path / "s.csv", IndexOptions(shard=(3, 3)))

    def test_shards_that_run_at_the_same_time_miss_nothing(self, tmp_path, root, monkeypatch):
        options = [IndexOptions(shard=(i, 2)) for i in range(2)]
        probe_all, began = build.probe_all, []

        def probing(*arguments, **named):  # the other shard starts and finishes while this one is running
            began.append(True)
            if len(began) == 1:
                assert write_index(root, tmp_path / "s.csv", options[1])["left"] == 4
            return probe_all(*arguments, **named)

        monkeypatch.setattr(build, "probe_all", probing)
        assert write_index(root, tmp_path / "s.csv", options[0])["videos"] == len(Index.load(tmp_path / "s.csv")) == 7

    def test_results_are_kept_although_a_video_before_them_is_still_read(self, tmp_path, root, monkeypatch):
        """A run that is killed while it reads a long first video continues with that one."""
        real, begun, journal = build.probe, [], tmp_path / "index.probe.jsonl"

        def slow(path, **options):
            begun.append(path)
            if path != begun[0]:
                return real(path, **options)
            for _ in range(6000):
                if journal.exists() and len(journal.read_text().splitlines()) == 6:
                    break
                time.sleep(0.01)
            raise KeyboardInterrupt

        monkeypatch.setattr(build, "probe", slow)
        with pytest.raises(KeyboardInterrupt) as stopped:
            make(tmp_path, root)
        assert stopped.value.__notes__ == ["the results of 6 of 7 files are kept"]
        monkeypatch.setattr(build, "probe", real)
        assert write_index(root, tmp_path / "index.csv", IndexOptions())["probed"] == 1


class TestTranscode:
    def test_frames_size_and_groups_of_pictures(self, tmp_path):
        root = tmp_path / "set" / "a"
        root.mkdir(parents=True)
        write_numbered(root / "v", 47, "mpeg4-avi")
        shutil.copy(shared_data("tiny", "rotated_90.mov"), root / "turned.mov")
        write(root / "text.avi", "not a video")
        index, report = make(tmp_path, tmp_path / "set", transcode=tmp_path / "new", short_side=32)
        by_name = {video.path.name: video for video in index}
        assert by_name.keys() == {"v.avi.mp4", "turned.mov.mp4"} and report["counts"]["broken"] == 1
        video = by_name["v.avi.mp4"]
        assert (video.num_frames, video.width, video.height, video.fps) == (47, 42, 32, 25.0)
        truth = decode_linearly(root / "v.avi")
        assert numbers_shown(resized(decode_linearly(video.path))) == numbers_shown(truth) == list(range(47))
        with av.open(str(video.path)) as container:
            keys = [i for i, packet in enumerate(container.demux(video=0)) if packet.is_keyframe]
        assert keys[:4] == [0, 12, 24, 36]
        with av.open(str(root / "turned.mov")) as container:
            stored = next(container.decode(video=0))
            upright = np.rot90(stored.to_ndarray(format="rgb24"), stored.rotation // 90)
        turned = by_name["turned.mov.mp4"]
        assert (turned.width > turned.height) == (upright.shape[1] > upright.shape[0])
        assert min(turned.width, turned.height) == 32 and probe_video(turned.path).rotation == 0

    def test_it_goes_on_and_lmdb_is_refused(self, tmp_path, clip):
        place(clip, tmp_path / "set" / "a" / "v.mp4", tmp_path / "set" / "b" / "v.mp4")
        for probed in (2, 2):  # the journal is deleted once the index is written; the files are written again
            _, report = make(tmp_path, tmp_path / "set", transcode=tmp_path / "new")
            assert report["probed"] == probed and report["videos"] == 2
        with RecordWriter(tmp_path / "x.lmdb") as writer:
            writer.put("a/b", [b""])
        with pytest.raises(InputError, match="nothing to transcode"):
            make(tmp_path, tmp_path / "x.lmdb", layout="lmdb", transcode=tmp_path / "new")


def resized(pictures: np.ndarray) -> np.ndarray:
    """Resizes to 48x64, the size that `numbers_shown` reads, by nearest neighbour."""
    rows = np.arange(48) * pictures.shape[1] // 48
    return pictures[:, rows][:, :, np.arange(64) * pictures.shape[2] // 64]


def write_variable_rate(path: Path) -> None:
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        time = 0
        for i in range(30):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 8 * i, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            time += 40 if i % 3 else 120
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
