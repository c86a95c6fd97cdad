"""What the videos of a data set hold: probed in parallel, noted in a journal so that a stopped run goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from cpr_fast.data.storage.records import frame_size, read_record_frames, split_record
from cpr_fast.data.video.container import VideoError
from cpr_fast.data.video.probe import VideoInfo, probe_video
from cpr_fast.runtime.progress import track

Probe = Callable[[Path], VideoInfo]


def probe(path: Path, *, verify: bool) -> VideoInfo:
    """What a video holds, from its packets or (`verify`) from decoding it whole. Raises VideoError."""
    if split_record(path) is None:
        return probe_video(path, decode=verify)
    frames, height, width = frame_size(path)
    error = ""
    if verify:
        try:
            for frame in range(frames):
                read_record_frames(path, [frame], "rgb")
        except VideoError as failure:
            if frame == 0:
                raise
            frames, error = frame, failure.reason
    return VideoInfo(frames, 25.0, width, height, "mjpeg", error)  # an LMDB file does not say its rate


class Journal:
    """Results by path: lines of JSON, appended to `file`; `read` takes in those of every shard of the same index.

    A result holds as long as the video's size and time of change, and what was done to it, stay the same.
    """

    def __init__(self, file: Path | None, task: str) -> None:
        self._file, self._task = file, task
        self._results: dict[tuple[object, ...], dict] = {}  # by path and state

    def read(self, files: Iterable[Path]) -> None:
        """Takes in what stands in journals; other shards may be writing theirs."""
        for path in files:
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                    self._results[row["path"], *row["state"]] = row
                except (json.JSONDecodeError, KeyError):  # the last line of a run that was killed
                    continue

    def get(self, path: Path) -> VideoInfo | VideoError | None:
        row = self._results.get((str(path), *self._state(path)))
        if row is None:
            return None
        return VideoInfo(**row["info"]) if "info" in row else VideoError(path, row["reason"])

    def add(self, path: Path, result: VideoInfo | VideoError) -> None:
        row = {"path": str(path), "state": self._state(path)}
        row |= {"reason": result.reason} if isinstance(result, VideoError) else {"info": asdict(result)}
        self._results[row["path"], *row["state"]] = row
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(f"\n{json.dumps(row)}")  # the newline first: the last line may be half a one

    def _state(self, path: Path) -> list[object]:
        record = split_record(path)
        try:
            stat = os.stat(path if record is None else record[0])
        except OSError:
            return [0, 0, self._task]
        return [stat.st_size, stat.st_mtime_ns, self._task]


def probe_all(paths: Sequence[Path], run: Probe, journal: Journal, *, description: str, progress: bool) -> int:
    """Fills the journal with the result of `run` for every path it lacks; returns how many those were.

    FFmpeg and libjpeg-turbo work without the interpreter's lock, so threads use every core.
    """
    todo = [path for path in paths if journal.get(path) is None]

    def work(path: Path) -> tuple[Path, VideoInfo | VideoError]:
        try:
            return path, run(path)
        except VideoError as error:
            return path, error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results: Iterator = pool.map(work, todo)
        for path, result in track(results, description, total=len(todo), unit="files", progress=progress):
            journal.add(path, result)
    return len(todo)
