"""Probes the videos of a data set in parallel; a journal of the results lets a stopped run continue."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from cpr_fast.data.files.names import is_frames
from cpr_fast.data.storage.media import frame_size, is_pictures, read_picture_parts, state_of
from cpr_fast.data.storage.pictures import count_pictures, picture_size
from cpr_fast.data.video.container import VideoError
from cpr_fast.data.video.probe import ASSUMED_FPS, VideoInfo, probe_video
from cpr_fast.runtime.files import append_line, naming
from cpr_fast.runtime.progress import Forecast, about, as_finished, track
from cpr_fast.wording import counted

Probe = Callable[[Path], VideoInfo]
# The remaining time is estimated after ESTIMATE_S seconds, and logged if it is longer than WORTH_SAYING_S.
ESTIMATE_S, WORTH_SAYING_S = 5.0, 60.0

log = logging.getLogger(__name__)


def probe(path: Path, *, verify: bool) -> VideoInfo:
    """Returns the properties of a video, from its packets or, with `verify`, by decoding it completely. Raises
    VideoError."""
    if not is_pictures(path):
        return probe_video(path, decode=verify)
    error, change = "", ""
    if is_frames(path):
        (frames, error), (height, width) = count_pictures(path), picture_size(path)
    else:
        frames, height, width = frame_size(path)
    if verify:
        try:
            for frame in range(frames):
                now = read_picture_parts(path, [frame], "rgb").shape[1:3]
                if now != (height, width):
                    frames, error, change = frame, "", f"from {width}x{height} to {now[1]}x{now[0]}"
                    break
        except VideoError as failure:
            if frame == 0:
                raise
            frames, error = frame, failure.reason
    # pictures do not tell the frame rate
    return VideoInfo(frames, ASSUMED_FPS, width, height, "mjpeg", error, size_change=change)


class Journal:
    """Results by path: lines of JSON that are appended to `file`; `read` adds those of all shards of one index.

    A result is valid as long as the video's size and time of change, and the task, stay the same.
    """

    def __init__(self, file: Path | None, task: str) -> None:
        self._file, self._task = file, task
        self._results: dict[tuple[object, ...], dict] = {}  # by path and state

    def read(self, files: Iterable[Path]) -> None:
        """Adds the results of journals, which other shards may be writing."""
        for path in files:
            try:
                text = path.read_text(encoding="utf-8", errors="replace")
            except FileNotFoundError:  # the command that finished the index has removed it
                continue
            for line in text.splitlines():
                try:
                    row = json.loads(line)
                    self._results[row["path"], *row["state"]] = row
                except (json.JSONDecodeError, KeyError, TypeError):  # the last line of a run that was killed
                    continue

    @property
    def stored(self) -> bool:
        """Whether the results outlive the process."""
        return self._file is not None

    def get(self, path: Path) -> VideoInfo | VideoError | None:
        """Returns the result of a video, None if there is no valid one."""
        row = self._results.get((str(path), *self._state(path)))
        if row is None:
            return None
        if "info" in row:
            try:
                return VideoInfo(**row["info"])
            except TypeError:  # written by a version that measured other properties: the video is probed again
                return None
        return VideoError(path, row["reason"], unreadable=row.get("unreadable", False))

    def wants(self, path: Path) -> bool:
        """Returns whether a video must be probed: it has no result, or could not be read the last time."""
        result = self.get(path)
        return result is None or (isinstance(result, VideoError) and result.unreadable)

    def add(self, path: Path, result: VideoInfo | VideoError) -> None:
        """Stores the result of a video, and appends it to the journal's file."""
        row = {"path": str(path), "state": self._state(path)}
        if isinstance(result, VideoError):
            row |= {"reason": result.reason, "unreadable": result.unreadable}
        else:
            row |= {"info": asdict(result)}
        self._results[row["path"], *row["state"]] = row
        if self._file is not None:
            with naming(self._file, "the results so far are kept, and the same command continues after them"):
                append_line(self._file, json.dumps(row))

    def _state(self, path: Path) -> list[object]:
        try:
            return [*state_of(path), self._task]
        except OSError:
            return [0, 0, self._task]


def probe_all(
    todo: Sequence[Path], run: Probe, journal: Journal, *, total: int, description: str, progress: bool
) -> None:
    """Adds the result of `run` for every path to the journal; `total` counts these and those with a result already.

    FFmpeg and libjpeg-turbo work without the interpreter's lock, so threads use every core.
    """

    def work(path: Path) -> tuple[Path, VideoInfo | VideoError]:
        try:
            return path, run(path)
        except VideoError as error:
            return path, error

    workers, kept = os.cpu_count() or 1, total - len(todo)
    with closing(as_finished(work, todo, workers)) as finished:
        results = _with_estimate(finished, len(todo), description, workers) if progress else finished
        try:
            for path, result in track(
                results, description, total=len(todo), unit="files", progress=progress and bool(todo)
            ):
                journal.add(path, result)
                kept += 1
        except KeyboardInterrupt as stopped:
            if journal.stored:
                stopped.add_note(f"the results of {kept:,} of {counted(total, 'file')} are kept")
            raise


def _with_estimate(results: Iterable, total: int, description: str, workers: int) -> Iterator:
    """Yields the results; after the first few, logs the estimated time for the rest if it is long."""
    began, said, forecast = time.monotonic(), False, Forecast(total)
    for done, result in enumerate(results, start=1):
        forecast.add()
        passed = time.monotonic() - began
        if not said and passed > ESTIMATE_S and done > workers:  # each thread's first file also fills the disk's cache
            said, left = True, forecast.left_s()
            if left > WORTH_SAYING_S:
                log.info("%s", _estimate(description, total, left, (total - done) / left))
        yield result


def _estimate(description: str, total: int, left_s: float, rate: float) -> str:
    faster = " --no-verify counts packets instead of decoding every video." if description == "decoding" else ""
    return (
        f"{description} {counted(total, 'video')}: {about(left_s)} left, at {rate:.1f} videos/s. "
        f"--shard 0/4 to 3/4 on four machines takes a quarter of that.{faster}"
    )
