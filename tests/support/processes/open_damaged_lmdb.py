"""Opens 150 LMDB files with wrong bytes in the pages of their tree, and prints how often each exit code came, as JSON.

    python open_damaged_lmdb.py FOLDER read_everything|write_more

Each file is opened in a forked process of its own, which a bus error would end. They are forked here, from a process
with one thread: one that is forked while another thread of its parent holds a lock waits for that lock forever.

The exit codes: 0, what was found is what was written; 2, the error is an InputError that names the file; 3, something
else was found; 4, the error does not name the file; 5, any other error; below 0, the signal that ended the process,
SIGALRM if it did not end within a minute.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import simplejpeg

from cpr_fast.data.storage.record_writer import RecordWriter
from cpr_fast.data.storage.records import open_records, read_record_frames
from cpr_fast.data.video.container import VideoError
from cpr_fast.errors import InputError


def tree_pages(file: Path) -> list[int]:
    """Returns the positions, in bytes, of the pages of the tree whose root the newer header names."""
    data = file.read_bytes()
    headers = [data[16 + 4096 * i :][:136] for i in range(2)]
    newer = max(headers, key=lambda header: header[128:136][::-1])
    below, found = [int.from_bytes(newer[112:120], "little")], []
    while below:
        found.append(at := 4096 * below.pop())
        lower = int.from_bytes(data[at + 12 : at + 14], "little")
        for entry in range(16, lower, 2) if data[at + 10] & 1 else ():  # a branch
            node = at + int.from_bytes(data[at + entry : at + entry + 2], "little")
            below.append(int.from_bytes(data[node : node + 4], "little"))
    return found


def read_everything(file: Path) -> dict[str, bytes]:
    """Returns the pixels of every video that can be read."""
    records, found = open_records(file), {}
    lengths = records.num_frames()
    for name in records.names:
        try:
            found[name] = read_record_frames(Path(f"{file}#{name}"), range(lengths[name]), "rgb").tobytes()
            records.origin(name)
        except VideoError as error:
            assert name in str(error)
    return found


def write_more(file: Path) -> dict[str, bytes]:
    with RecordWriter(file) as writer:
        for i in range(4):
            writer.put(f"more/{i}", [b"x" * 3000] * 3, "origin")
    return {}


USES = {use.__name__: use for use in (read_everything, write_more)}


def exit_code(use: str, file: Path, expected: dict[str, bytes]) -> int:
    """Returns what the process that uses the file ends with."""
    try:
        return 0 if USES[use](file).items() <= expected.items() else 3
    except InputError as error:
        return 2 if str(file) in str(error) else 4
    except BaseException:
        return 5


def main() -> None:
    folder, use = Path(sys.argv[1]), sys.argv[2]
    good = folder / "a.lmdb"
    with RecordWriter(good) as writer:
        for i in range(150):
            pictures = np.random.default_rng(i).integers(0, 256, (1 + i % 3, 16, 24, 3), np.uint8)
            writer.put(f"c{i % 3}/v{i}", [simplejpeg.encode_jpeg(picture) for picture in pictures], f"origin {i}")
    whole, pages, rng = good.read_bytes(), tree_pages(good), np.random.default_rng(0)
    assert len(pages) > 3
    expected, said = read_everything(good), Counter[int]()
    for number in range(150):
        # A single wrong byte may also be in a part of a page that nothing refers to.
        damaged, count = bytearray(whole), (1, 4, 20)[number % 3]
        for at in rng.choice(pages) + rng.choice([*range(0, 16)] * 8 + [*range(16, 60)] * 8 + [*range(4096)], count):
            damaged[at] = rng.choice([0, 255, rng.integers(256)])
        file = folder / f"{number}.lmdb"
        file.write_bytes(damaged)
        if not (child := os.fork()):
            signal.alarm(60)
            os._exit(exit_code(use, file, expected))
        said[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])] += 1
    assert len(os.listdir("/proc/self/task")) == 1, "another thread was running"
    print(json.dumps(said))


if __name__ == "__main__":
    main()
