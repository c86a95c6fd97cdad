"""Checks of the options and files that a command line names, before anything heavy, such as torch, is imported.

The command line calls `check_inputs` so that a misspelt path is reported immediately. Each command checks its arguments
again after they are parsed. The second check also finds the paths that the first one misses because of the order of the
arguments.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from cpr_fast.data.features.names import TABLE, is_store
from cpr_fast.data.files.names import is_remote
from cpr_fast.errors import InputError
from cpr_fast.wording import expected


def require_file(option: str, path: str | Path | None) -> None:
    """Raises InputError that names the option, if its file is given but does not exist.

    The functions of `os.path` treat a name that is too long, or links in a circle, as a file that does not exist.
    """
    if path is not None and not os.path.isfile(path):
        raise InputError(f"{option}: {expected('a file', path)}")


def require_files(option: str, paths: Iterable[str | Path]) -> None:
    """Calls `require_file` for every path."""
    for path in paths:
        require_file(option, path)


def require_features(option: str, path: str | Path) -> None:
    """Raises InputError that names the option and says what writes such a file, if the file of features does not
    exist and is no store of features."""
    if not os.path.isfile(path) and not is_store(path):
        written = "`cpr-fast pretrain RECIPE --dump-memory` writes RUN/memory/cycle-N.npz, and `cpr-fast embed` a store"
        raise InputError(f"{option}: {expected('a file or a store of features', path)}; {written}")


def require_other_file(option: str, out: str | Path, inputs: Iterable[str | Path]) -> None:
    """Raises InputError that names the option, if the file to write is one that the command reads: it would be lost."""
    for path in inputs:
        if os.path.basename(path) == os.path.basename(out) and os.path.exists(out) and os.path.samefile(path, out):
            raise InputError(f"{option}: expected the name of a new file, got {str(out)!r}, which this command reads")


# Suffixes by which people and programs know what a file is, so that no command writes something else under them.
KNOWN_SUFFIXES = (".csv", ".html", ".json", ".jsonl", ".lmdb", ".npz", ".pt", ".toml", ".avi", ".mkv", ".mov", ".mp4",
                  ".webm")  # fmt: skip


def require_suffix(option: str, out: str | Path, suffix: str) -> None:
    """Raises InputError that names the option, if the file to write has the suffix of a file of another kind."""
    given = os.path.splitext(out)[1].lower()
    if given != suffix and given in KNOWN_SUFFIXES:
        raise InputError(f"{option}: expected a name that ends in {suffix}, got {str(out)!r}")


def require_output(option: str, out: str | Path) -> None:
    """Raises InputError that names the option, if the file or folder `out` cannot be created, or no file in the folder
    that it is. Commands would otherwise fail when they write their results, after all their work."""
    from cpr_fast.runtime.files import require_writable

    require_writable(option, Path(out).parent if os.path.isfile(out) else Path(out), "Choose another place")


def require_folder(option: str, path: str | Path | None) -> None:
    """Raises InputError that names the option, if its folder is given but does not exist."""
    if path is not None and not os.path.isdir(path):
        raise InputError(f"{option}: {expected('a folder', path, 'is a file' if os.path.isfile(path) else '')}")


def require_data_set(option: str, path: str | Path) -> None:
    """Raises InputError that names the option, if the path is neither a folder nor an LMDB file."""
    if not is_remote(path) and not os.path.exists(path):
        raise InputError(f"{option}: {expected('a folder or an LMDB file', path)}")


def require_indexes(option: str, paths: Sequence[str | Path]) -> None:
    """Raises InputError that names the option, if an index, or a store of features, does not exist or is given twice:
    the deviation between indexes would be computed from equal results."""
    require_files(option, (path for path in paths if not is_store(path)))
    if again := [path for i, path in enumerate(paths) if any(os.path.samefile(path, other) for other in paths[:i])]:
        raise InputError(f"{option}: expected every index once, got {str(again[0])!r} again")


def require_index_or_store(option: str, path: str | Path) -> None:
    """Raises InputError that names the option, if neither an index nor a store of features is there."""
    if not is_store(path):
        require_file(option, path)


def require_store(option: str, path: str | Path) -> None:
    """Raises InputError that names the option, if it is no store of features, finished or not."""
    if not is_store(path):
        raise InputError(f"{option}: {expected('a store of features (see `cpr-fast embed`)', path)}")


def require_checkpoints(option: str, checkpoints: Iterable[str]) -> None:
    """Checks that the files of FILE or VIEW=FILE arguments exist, or that the only argument is a store of features."""
    given = list(checkpoints)
    if not given:
        raise InputError(f"{option}: expected a checkpoint file, got none")
    if len(given) == 1 and is_store(given[0]):
        return
    for text in given:
        view, equals, file = text.partition("=")
        is_pair = bool(equals) and view in ("rgb", "flow", "residual")
        path = Path(file if is_pair else text)
        if os.path.isfile(last := path / "checkpoints" / "last.pt"):
            raise InputError(f"{option}: expected a file, but {str(path)!r} is a run folder; its checkpoint is {last}")
        require_file(option, path)


def require_no_windows(paths: Iterable[str | Path], **options: object) -> None:
    """Raises InputError that names the first option that is given, if one of the paths is a store of features: these
    options say how the windows of videos are cut and become one feature, which a store holds already."""
    store = next((path for path in paths if is_store(path)), None)
    for name, value in options.items():
        if store is not None and value is not None:
            raise InputError(
                f"--{name}: expected no such option with the store of features {str(store)!r}, got {value}: a store "
                "holds one feature of each clip, for which no windows are cut"
            )


def require_runs(option: str, paths: Iterable[str | Path]) -> None:
    """Raises InputError that names the option, if a path is no run folder."""
    for path in map(Path, paths):
        require_folder(option, path)
        if not (path / "metrics.jsonl").is_file():
            near = next((folder for folder in path.resolve().parents[:2] if (folder / "metrics.jsonl").is_file()), None)
            raise InputError(
                f"{option}: {str(path)!r} has no metrics.jsonl; expected a folder written by `cpr-fast pretrain`"
                + (f"; did you mean {str(near)!r}?" if near else "")
            )


def require_videos(option: str, paths: Iterable[str | Path]) -> None:
    """Raises the error of the reader of an index, which names its row, if one of the indexes has a row that cannot be
    used, such as that of a video that does not exist. Large indexes are left to the command, which reads them again.

    Imports NumPy and PyAV, which take much less time than torch.
    """
    from cpr_fast.data.index.index import Index

    for path in paths:
        if not is_store(path) and os.path.getsize(path) <= QUICKLY_READ:
            Index.load(path, require_flow=False)


def require_splits(option: str, paths: Iterable[str | Path]) -> None:
    """Raises InputError that names the option, if no row of an index has a split; other faults of an index are left to
    the reader of the index."""
    from cpr_fast.data.index.tables import TableError, read_table

    for path in map(Path, paths):
        try:
            header, rows = read_table(path / TABLE if is_store(path) else path, ("path", "split"))
        except TableError:
            continue
        if "split" not in header or any(len(row) != len(header) for _, row in rows):
            continue
        column = header.index("split")
        if rows and not any(row[column].strip() for _, row in rows):
            raise InputError(
                f"{option}: expected videos of the splits train and test, but the column 'split' of {str(path)!r} is "
                "empty; write train or test into each row, or index videos that lie in folders of these names. "
                "`cpr-fast retrieve` needs no splits"
            )


def require_at_least(option: str, least: float, value: float | None) -> None:
    """Raises InputError that names the option, if its value is given but is smaller than `least` or is not a number."""
    if value is not None and not value >= least:
        raise InputError(f"{option}: expected {least} or more, got {value}")


def require_device(option: str, name: str, *others: str) -> None:
    """Raises InputError that names the option, if its value is neither a device nor one of `others`, or if it is a CUDA
    device of a machine without a driver. Whether torch sees the device is checked when torch is imported."""
    if name in others:
        return
    if not re.fullmatch(r"cpu|cuda(:\d{1,2})?", name):
        known = [*map(repr, others), "'cpu'", "'cuda'"]
        raise InputError(f"{option}: expected {', '.join(known)} or 'cuda:N', got {name!r}")
    if name != "cpu":
        import ctypes

        try:
            ctypes.CDLL("libcuda.so.1")
        except OSError:
            raise InputError(f"{option}: got {name!r}, but this machine has no NVIDIA driver (libcuda.so.1)") from None


def parse_shard(text: str) -> tuple[int, int]:
    """Returns (i, n) of "i/n". Raises InputError naming --shard."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise InputError(f"--shard: expected i/n with 0 <= i < n, got {text!r}")
    return int(index), int(count)


def next_shard(shard: tuple[int, int]) -> list[str]:
    """Returns the option of the first shard other than (i, n), such as ["--shard", "0/8"]; nothing if n is 1."""
    number, count = shard
    return [] if count == 1 else ["--shard", f"{0 if number else 1}/{count}"]


def other_shards(shard: tuple[int, int]) -> str:
    """Returns the shards other than (i, n), such as "0/8 to 1/8, 3/8 to 7/8"; nothing if n is 1."""
    number, count = shard
    groups = [group for group in (range(number), range(number + 1, count)) if group]
    named = [f"{group[0]}/{count}" + (f" to {group[-1]}/{count}" if len(group) > 1 else "") for group in groups]
    return ", ".join(named)


def unknown_option(option: str, known: Iterable[str], *, otherwise: str) -> InputError:
    """Returns the error about a misspelt option: the most similar one, or if none is similar the text `otherwise`."""
    if os.path.lexists(option):
        return InputError(f"unknown option {option}; a path that begins with a dash is written './{option}'")
    close = difflib.get_close_matches(option.replace("_", "-"), sorted(known), n=1)
    return InputError(f"unknown option {option}; {f'did you mean {close[0]}?' if close else otherwise}")


def with_home(arguments: Sequence[str]) -> list[str]:
    """Returns a command line in which a leading `~` of every path is the home folder, also after an equals sign
    (`--out=~/runs`, `rgb=~/a.pt`) and in quotes, where shells leave it, and in which a path that begins with a dash
    (`--out=-x.csv`) begins with `./`. Raises InputError for `$HOME` and the like."""
    words, option = [], "argument"
    for word in arguments:
        name, equals, value = word.partition("=")
        if word.startswith("-"):
            option = name
        if not equals or "/" in name:
            name, equals, value = "", "", word
        if "~" in value or "$" in value:
            from cpr_fast.config.load import expanded

            value = expanded(option, value)
        if equals and option == name and value.startswith("-") and not _is_number(value):
            value = f"./{value}"  # commands print the path in commands to run next, where it would be an option
        words.append(f"{name}{equals}{value}")
    return words


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


QUICKLY_READ = 2**22  # bytes of an index, about 40,000 rows

Check = Callable[[str, Sequence[str]], None]


def _one(check: Callable[[str, str], None]) -> Check:
    """Applies the check of one path to the first value of an option."""
    return lambda option, values: check(option, values[0])


FILE, FOLDER, OUTPUT = _one(require_file), _one(require_folder), _one(require_output)
SHARD = _one(lambda _option, text: parse_shard(text))

# The input files, and where the output goes, of every command but `pretrain`, which reads its own command line. Names
# in capitals are positional.
INPUTS: dict[str, dict[str, Check]] = {
    "quickstart": {"--out": OUTPUT},
    "doctor": {"INDEX": _one(require_index_or_store), "--features": _one(require_store), "--config": FILE},
    "synth": {"OUT": OUTPUT},
    "index": {"ROOT": _one(require_data_set), "--splits": FOLDER, "--flow-lmdb": FILE, "--shard": SHARD,
              "--transcode": OUTPUT, "--out": OUTPUT},
    "flow": {"INDEX": FILE, "--shard": SHARD, "--out": OUTPUT},
    "embed": {"INDEX": FILE, "--shard": SHARD, "--out": OUTPUT},
    "show-sample": {"INDEX": FILE, "--config": FILE, "--out": OUTPUT},
    "init": {"INDEX": FILE, "--out": OUTPUT},
    "reproduce": {"--index": FILE, "--settings": FILE, "--hmdb51": FILE, "--k400": FILE, "--out": OUTPUT},
    "verify": {"RUN": require_runs, "--index": FILE},
    "diff": {"RUNS": require_runs},
    "import-checkpoint": {"FILE": FILE, "--out": OUTPUT},
    "export": {"CHECKPOINT": FILE, "--out": OUTPUT},
    "retrieve": {"CHECKPOINT": require_checkpoints, "--index": require_indexes},
    "probe": {"CHECKPOINT": require_checkpoints, "--index": require_indexes, "--config": FILE},
    "finetune": {"CHECKPOINT": require_checkpoints, "--index": require_indexes, "--config": FILE},
    "search": {"QUERIES": require_files, "--index": FILE, "--checkpoint": require_checkpoints, "--out": OUTPUT},
    "dedup": {"INDEX": FILE, "--checkpoint": require_checkpoints, "--features": _one(require_store), "--shard": SHARD,
              "--out": OUTPUT},
    "mine": {"FEATURES": _one(require_features)},
    "compare": {"RUNS": require_runs, "--against": require_runs},
    "report": {"RUNS": require_runs, "--index": FILE, "--out": OUTPUT},
}  # fmt: skip


def check_inputs(command: str, arguments: Sequence[str]) -> None:
    """Checks the input files that can be identified in a command line before it is parsed.

    These are the values of the options in `INPUTS` and the words before the first option. Raises InputError naming the
    option or argument.
    """
    checks = INPUTS.get(command, {})
    if not checks or "-h" in arguments or "--help" in arguments:
        return
    positional = next((name for name in checks if name.isupper()), "")
    values: dict[str, list[str]] = {positional: []}
    option = positional
    for word in arguments:
        if word.startswith("-"):
            name, equals, value = word.partition("=")
            option = name.replace("_", "-")
            values[option] = [value] if equals else []
        else:
            values[option].append(word)
    for name, check in checks.items():
        if values.get(name):
            check(name, values[name])
