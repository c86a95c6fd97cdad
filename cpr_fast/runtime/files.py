"""Writing files: whole files in one step, whole lines at the end of a file, and one sentence where a disk is full."""

from __future__ import annotations

import errno
import fcntl
import functools
import itertools
import logging
import os
import secrets
import shutil
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from cpr_fast.errors import InputError

# A full disk, a used-up quota, a file above the limit of the process or the file system, a failing or read-only disk.
# Missing permission is not among them, because it concerns files that are read as well.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
OTHER_FOLDER = "Choose another folder with --run.out"
RUN_LOCK = ".run.lock"  # in a run folder; held as long as the run trains
CHECKPOINTS = ("last.pt", "best.pt")  # of a run folder, beside those of single steps
UNTOUCHED, NOTHING_LEFT = "the previous file is untouched", "nothing was left behind"
TEMPORARY = ".cpr-fast-"  # how the names of files and folders begin that exist only while they are written
TRIES = 100  # to create a file in a new folder that failing processes remove at the same time

T = TypeVar("T")

log = logging.getLogger(__name__)

_creating = threading.Lock()
_created: set[Path] = set()  # folders that running blocks of `created` have made
_in_use: Counter[Path] = Counter()  # how many running blocks need a folder


@contextmanager
def naming(path: str | Path, kept: str) -> Iterator[None]:
    """Converts an error of the disk to one sentence that names the file, what happened and what is kept.

    Args:
        path: What the block writes.
        kept: What remains usable, such as "the previous file is untouched".
    Raises:
        InputError: the block raised one of DISK_ERRORS, or lacks the permission to create or change `path`, a file
            beside it or in it, or one of its folders. Other errors are not changed.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS and not _is_refused(error, Path(path)):
            raise
        reason = error.strerror or os.strerror(error.errno)
        raise InputError(f"could not write {str(path)!r}: {reason}; {kept}") from error


def run_checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints of a run folder from which its run could continue, in the order in which to try them."""
    checkpoints = folder / "checkpoints"
    last, best = (checkpoints / name for name in CHECKPOINTS)
    steps = sorted(checkpoints.glob("step-*.pt"), reverse=True)
    return [*([last] if last.exists() else []), *steps, *([best] if best.exists() else [])]


def require_new_run(folder: Path) -> None:
    """Raises InputError if a run folder holds the checkpoint of a run, which a new run would overwrite."""
    if found := run_checkpoints(folder):
        raise InputError(
            f"run.out: {str(folder)!r} already holds a run ({found[0].relative_to(folder)}). Continue it with "
            "--resume, or choose another folder with --run.out"
        )


def new_run_folder(folder: Path) -> Path:
    """Returns `folder`, or if it holds a run the first of FOLDER-2, FOLDER-3, ... that holds none."""
    names = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    return folder if not run_checkpoints(folder) else next(name for name in names if not run_checkpoints(name))


def _is_refused(error: OSError, path: Path) -> bool:
    """Returns whether the permission to write a file, or into one of its folders, is missing."""
    if error.errno not in (errno.EACCES, errno.EPERM):
        return False
    refused = Path(os.path.abspath(os.fsdecode(error.filename or path)))
    path = Path(os.path.abspath(path))
    return refused.parent in (path, path.parent) or refused in path.parents


def require_writable(what: str, folder: Path, advice: str) -> None:
    """Raises InputError that names `what` if no file can be created in a folder, or where it would be created.

    Commands that compute for long call it first, because they would fail only when they write their results.
    """
    import tempfile  # imported here, because every command imports this module, and most do not need it

    try:
        existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        reason = error.strerror or os.strerror(error.errno)
        raise InputError(f"{what}: cannot write to {str(folder)!r}: {reason}. {advice}") from error


def require_run_folder(folder: Path) -> None:
    """Raises InputError if a run cannot write to its folder."""
    require_writable("run.out", folder, OTHER_FOLDER)


@contextmanager
def created(folder: str | Path) -> Iterator[None]:
    """Creates a folder for the block. If the block raises, the folders that were created are removed again, unless
    something is in them: a command that refuses its input leaves nothing behind.

    Threads may create the same folder at the same time: the last of their blocks that fail removes it. Another process
    may remove it as long as it is empty, hence `_in_folder`.
    """
    folder = Path(os.path.abspath(folder))
    places, raised = (folder, *folder.parents), True
    with _creating:
        _created.update(place for place in places if not place.exists())
        _in_use.update(places)
    try:
        _in_folder(folder, lambda: None)
        yield
        raised = False
    finally:
        with _creating:
            _in_use.subtract(places)
            unused = [place for place in places if place in _created and not _in_use[place]]
            _created.difference_update(unused)
            if raised:
                with suppress(OSError):
                    for place in unused:
                        place.rmdir()


def _in_folder(folder: Path, create: Callable[[], T]) -> T:
    """Makes a folder and returns what `create` does in it; again if the folder was removed in between, by another
    process whose block of `created` has failed."""
    for left in reversed(range(TRIES)):
        try:
            with _creating:  # so that no other block removes a part of the path meanwhile
                folder.mkdir(parents=True, exist_ok=True)
            return create()
        except (FileNotFoundError, FileExistsError):  # the latter from mkdir, where what existed is no longer there
            if not left:
                raise


@contextmanager
def replacing(path: str | Path, kept: str = "", *, durable: bool = False) -> Iterator[Path]:
    """Replaces a file in one step: yields the path of a temporary file for the block to write, then renames it.

    The folder is created, see `created`. Other processes and threads may replace the same file at the same time: one of
    their whole files remains. The temporary file is beside `path` and has its suffix, by which some writers choose the
    format; a process that is killed leaves it, and the next process that replaces a file in this folder removes it.

    Args:
        kept: What remains usable if the disk is full; by default that the file is as it was before.
        durable: Whether the file is on the disk before it gets its name, so that a power failure cannot damage it.
    Raises:
        InputError: the disk is full; see `naming`.
    """
    path = Path(path)
    suffix = path.suffix if len(os.fsencode(path.suffix)) < 16 else ""
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(6)}{suffix}")
    with naming(path, kept or (UNTOUCHED if path.exists() else NOTHING_LEFT)), created(path.parent):
        _remove_abandoned(path.parent.absolute())
        descriptor = _in_folder(path.parent, lambda: _open_locked(temporary))
        try:
            yield temporary
            if durable:
                _sync(temporary)
            os.replace(temporary, path)
            if durable:
                with suppress(OSError):  # a file system that does not sync folders
                    _sync(path.parent)  # the rename
        finally:
            temporary.unlink(missing_ok=True)
            os.close(descriptor)


def _sync(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def temporary_folder(parent: str | Path) -> Iterator[Path]:
    """Yields a new folder that is removed after the block or, if the process is killed, as a file of `replacing` is."""
    _remove_abandoned(Path(parent).absolute())
    folder = Path(parent) / f"{TEMPORARY}{secrets.token_hex(6)}"
    while True:
        descriptor = _in_folder(folder, lambda: os.open(folder, os.O_RDONLY))
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _is_current(descriptor, folder):
            break
        os.close(descriptor)  # another process removed it before it was locked
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


@functools.cache
def _remove_abandoned(folder: Path) -> None:
    """Removes what killed processes left of `replacing` and `temporary_folder`, once per process: that no process has
    locked. What cannot be removed stays."""
    with suppress(OSError):
        for path in [Path(entry) for entry in os.scandir(folder) if entry.name.startswith(TEMPORARY)]:
            with suppress(OSError):
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                finally:
                    os.close(descriptor)


@contextmanager
def one_writer(lock: str | Path, busy: str | None, advice: str = "wait until it has ended") -> Iterator[None]:
    """Lets one process at a time run the block; the file `lock` exists meanwhile, and its folder is created,
    see `created`.

    The operating system releases the lock when the process ends, however it ends, so no stale lock can remain. Without
    locks (some network file systems) the block runs unprotected, and the log says so.

    Args:
        busy: What another process does while it runs the block, for the error, which adds the number of this process
            and its machine; None waits until the other process has ended.
        advice: What to do meanwhile; the end of the error.
    Raises:
        InputError: another process runs the block, or the folder cannot be written.
    """
    lock = Path(os.path.abspath(lock))
    with ExitStack() as stack:
        with naming(lock.parent, NOTHING_LEFT):
            stack.enter_context(created(lock.parent))
            refusal = None if busy is None else lambda holder: f"{busy} ({holder}); {advice}"
            descriptor = _in_folder(lock.parent, lambda: _open_locked(lock, refusal, warns=True))
            with suppress(OSError):  # a full disk; the holder is only for the refusal of others
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        try:
            yield
        finally:
            if _is_current(descriptor, lock):  # the block may have removed the folder
                lock.unlink(missing_ok=True)
            os.close(descriptor)


def is_locked(lock: Path) -> bool:
    """Returns whether another process holds the lock of this file; False if there is no such file, or no locks."""
    try:
        descriptor = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _open_locked(lock: Path, refusal: Callable[[str], str] | None = None, *, warns: bool = False) -> int:
    """Opens and locks a file; once more if the process that held the lock has removed the file meanwhile. `refusal`
    returns the error about the process that holds the lock; without it, the lock is waited for."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if refusal is None else fcntl.LOCK_NB))
        except BlockingIOError:
            holder = os.pread(descriptor, 400, 0).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise InputError(refusal(holder)) from None
        except OSError as error:
            if warns:
                said = "Cannot lock %r (%s): make sure that no other process writes there"
                log.warning(said, str(lock), error.strerror)
            return descriptor
        except BaseException:  # Ctrl-C while it waits
            os.close(descriptor)
            raise
        if _is_current(descriptor, lock):
            return descriptor
        os.close(descriptor)


def _is_current(descriptor: int, path: Path) -> bool:
    """Returns whether an open file is still the one at `path`, which another process may have removed or replaced."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):  # NFS calls a removed file stale
            return False
        raise


def discard(descriptor: int) -> None:
    """Opens the null device in the place of a file descriptor, such as that of stderr: what is written is lost."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != descriptor:
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


def append_line(path: Path, line: str) -> None:
    """Appends a single line to a file as `LineFile.append` does, and closes it."""
    file = LineFile(path)
    try:
        file.append(line)
    finally:
        file.close()


class LineFile:
    """Appends lines to a file that other processes may append to at the same time.

    A line is one write to a descriptor opened with O_APPEND, under a lock that is held only for this write. A line that
    does not fit on the disk is removed again, and an incomplete last line, which a killed process leaves, is removed by
    the next line. A file that was replaced meanwhile (see `locked`) is opened again.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with created(self.path.parent):
            self._descriptor = _in_folder(self.path.parent, self._open)

    def append(self, line: str) -> None:
        """Writes `line`, without line breaks, and a line break. Raises OSError if the disk is full."""
        data = line.encode() + b"\n"
        with self.locked():
            end = self._end_of_lines()
            try:
                written = os.write(self._descriptor, data)
                while written < len(data):  # a full disk: the next write says why
                    written += os.write(self._descriptor, data[written:])
            except OSError:
                with suppress(OSError):
                    os.ftruncate(self._descriptor, end)
                raise

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from appending while the block runs, which may also replace the file."""
        while True:
            descriptor = self._descriptor
            with suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_current(descriptor, self.path):
                break
            self._descriptor = self._open()
            os.close(descriptor)
        try:
            yield
        finally:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        """Closes the file, and removes it if nothing was ever written to it. Further calls have no effect."""
        if self._descriptor < 0:
            return
        with suppress(OSError), self.locked():  # another process opens the file again if it is removed
            if not os.fstat(self._descriptor).st_size:
                self.path.unlink()
        os.close(self._descriptor)
        self._descriptor = -1

    def _open(self) -> int:
        return os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def _end_of_lines(self) -> int:
        """Returns the length of the file, after an incomplete last line was removed."""
        end = os.fstat(self._descriptor).st_size
        if not end or os.pread(self._descriptor, 1, end - 1) == b"\n":
            return end
        with open(self.path, "rb") as file:
            whole = file.read().rfind(b"\n") + 1
        os.ftruncate(self._descriptor, whole)
        return whole
