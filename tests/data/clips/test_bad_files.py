"""Files that cannot be read: they are replaced, counted and reported; the loss of the disk ends the run."""

import dataclasses
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.data_sets.clips import DATA, assert_same_batches, collect

pytest.importorskip("nvidia.dali", reason="the loaders need NVIDIA DALI")

from cpr_fast.data.clips.loader import TrainLoader, WindowLoader
from cpr_fast.data.clips.reader import ClipReader
from cpr_fast.data.clips.sampling import Sources, plan_pairs
from cpr_fast.data.clips.stream import ClipStream, Job
from cpr_fast.data.index.index import Index
from cpr_fast.errors import InputError


class TestBadFiles:
    @pytest.fixture
    def damaged(self, index, tmp_path) -> Index:
        """Same as `index`, but with one text file, one missing flow file and one video shorter than the index says."""
        videos = list(index)
        (tmp_path / "text.mp4").write_text("not a video " * 100)
        videos[2] = dataclasses.replace(videos[2], path=tmp_path / "text.mp4")
        videos[5] = dataclasses.replace(videos[5], flow_path=tmp_path / "none.mp4")
        videos[8] = dataclasses.replace(videos[8], num_frames=500)
        return Index(videos)

    def test_substituted_counted_named_once(self, damaged, caplog):
        loader = TrainLoader(damaged, DATA, ["rgb", "flow"], seed=0)
        with caplog.at_level(logging.WARNING):
            batches = [batch for epoch in range(4) for batch in loader.epoch(epoch)]
        loader.close()
        assert all(len(batch.video) == 4 for batch in batches)
        assert not {2, 5, 8} & {video for batch in batches for video in batch.video.tolist()}
        names = [str(path) for path, _ in loader.skipped]
        assert len(names) == len(set(names)) == 3
        assert any("text.mp4" in n for n in names) and any("none.mp4" in n for n in names)
        assert ["the index says 500" in reason for path, reason in loader.skipped if path == damaged[8].path] == [True]
        assert all(sum(name in r.getMessage() for r in caplog.records) == 1 for name in names)

    @pytest.mark.parametrize("cache_gib", [0.0, 1.0])
    def test_the_substitute_depends_on_the_files_alone(self, damaged, cache_gib):
        reference = collect(TrainLoader(damaged, DATA, ["rgb", "flow"], seed=0), epoch=1)
        data = dataclasses.replace(DATA, workers=1, prefetch=1, cache_gib=cache_gib)
        fresh = TrainLoader(damaged, data, ["rgb", "flow"], seed=0)
        list(fresh.epoch(0))
        assert_same_batches(collect(fresh, epoch=1), reference)
        resumed = collect(TrainLoader(damaged, DATA, ["rgb", "flow"], seed=0), epoch=1, start_step=1)
        assert_same_batches(resumed, reference[1:])

    def test_all_bad(self, index, tmp_path):
        videos = []
        for i, video in enumerate(index):
            (tmp_path / f"text{i}.avi").write_text("not a video " * 100)
            videos.append(dataclasses.replace(video, path=tmp_path / f"text{i}.avi"))
        loader = TrainLoader(Index(videos), DATA, ["rgb"], seed=0)
        with pytest.raises(InputError, match=r"none of the 10 videos.*text\d\.avi.*Invalid data"):
            next(loader.epoch(0))
        loader.close()

    @pytest.mark.parametrize("cache_gib", [0.0, 1.0])
    def test_a_disk_that_disappears_ends_the_run_in_one_line(self, index, tmp_path, caplog, cache_gib):
        """The run ends even if some videos could still be read from the cache: training on only these would change the
        run.
        """
        disk = tmp_path / "mount"
        disk.mkdir()
        videos = [dataclasses.replace(v, path=Path(shutil.copy(v.path, disk))) for v in index]
        loader = TrainLoader(Index(videos), dataclasses.replace(DATA, cache_gib=cache_gib, workers=1), ["rgb"], seed=0)
        batches = loader.epoch(0)
        if cache_gib:
            next(batches)
        batches.close()
        disk.rename(tmp_path / "unmounted")
        with caplog.at_level(logging.WARNING), pytest.raises(InputError, match="10 of 10 files .* mount"):
            for epoch in range(3):
                list(loader.epoch(epoch))
        loader.close()
        assert len(caplog.records) == 1

    def test_a_batch_the_graph_fails_on_is_read_again_with_every_video_checked(self, index, tmp_path):
        """The hardware decoder fails for a whole batch without saying which video caused it, so the loader must find
        it.
        """

        (tmp_path / "text.mp4").write_text("not a video " * 100)
        bad = dataclasses.replace(index[1], path=tmp_path / "text.mp4")
        videos = Index([index[0], bad, index[2]])

        class Graph:
            def rows(self, clips):
                return np.arange(clips)

            def run(self, clips, samples):
                if bad in samples["rgb"]:
                    raise RuntimeError("decoder error")
                return samples

        plans = [plan_pairs(Sources.of(videos), np.array([video]), DATA, 0, 0) for video in range(3)]
        jobs = [Job(plans[0]), Job(plans[1], lambda: iter([plans[1], plans[2]]))]
        reader = ClipReader(videos, DATA, {"rgb": lambda video, clips, view, data: [video]})
        stream = ClipStream(reader, Graph(), workers=1, prefetch=1, check=True)
        batches = list(stream.stream([jobs], lambda materials: stream.run(materials)[0].video))
        stream.close()
        assert [batch.tolist() for batch in batches] == [[0, 0, 2, 2]]
        assert [path for path, _ in reader.skipped] == [bad.path]
        assert reader.skipped[0][1].startswith("Invalid data found when processing input: it is a text")

    def test_a_size_other_than_the_index_says(self, index):
        videos = [dataclasses.replace(index[0], width=99), index[1]]
        loader = TrainLoader(Index(videos), dataclasses.replace(DATA, batch_size=2), ["rgb"], seed=0)
        assert [batch.video.tolist() for batch in loader.epoch(0)] == [[1, 1]]
        assert "64x48, the index says 99x48" in loader.skipped[0][1]
        loader.close()

    def test_too_few_videos(self, index):
        with pytest.raises(InputError, match="holds 10 videos.*data.batch_size 4 x 3 ranks"):
            TrainLoader(index, DATA, ["rgb"], seed=0, world_size=3)

    def test_flow_asked_for_but_not_there(self, index):
        videos = [*list(index)[:9], dataclasses.replace(index[9], flow_path=None)]
        for loader in (TrainLoader, WindowLoader):
            options = {"seed": 0} if loader is TrainLoader else {}
            with pytest.raises(InputError, match=f"{Path(index[9].path).name}.*no flow_path"):
                loader(Index(videos), DATA, ["rgb", "flow"], **options)

    def test_videos_that_cannot_be_read_are_the_only_ones_missing(self, damaged):
        loader = WindowLoader(damaged, DATA, ["rgb", "flow"], batch_size=3)
        seen = {video for batch in loader for video in batch.video.tolist()}
        assert seen == {0, 1, 3, 4, 6, 7, 9}
        assert len(loader.skipped) == 3
        loader.close()
