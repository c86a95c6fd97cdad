"""Lists the videos in tar files that are named as WebDataset names them, with class, source and split beside each.

A *sample* is the members of one key that follow one another; the key is a member's name up to the first dot of its last
part. `walk/0001.mp4`, `walk/0001.json` and `walk/0001.txt` are one sample.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from cpr_fast.data.files.names import Member, is_remote, is_tar, member_path, plain_name, text_of
from cpr_fast.data.files.remote import remote_files
from cpr_fast.data.files.tar import TAR, members
from cpr_fast.data.index.catalogue import VIDEO_SUFFIXES, Problem, walked
from cpr_fast.data.index.listing import Listed, Listing, split_in, split_name
from cpr_fast.data.video.contents import what_it_is
from cpr_fast.errors import InputError

READERS = 16  # tar files that are read at the same time; on a server they mostly wait
CLASS, CAPTION, FACTS = ".cls", ".txt", ".json"
LONGEST_TEXT = 2**20  # bytes of a text beside a video
_KEY = re.compile(r"((?:.*/)?[^./][^./]*)(\.[^/]*)", re.DOTALL)


@dataclass
class Sample:
    """The members of one key."""

    key: str
    videos: list[Member] = field(default_factory=list)
    texts: dict[str, Member] = field(default_factory=dict)  # by suffix


def list_shards(root: Path) -> Listing:
    """Lists the videos in tar files.

    The class is the entry "label" (or "class") of the JSON, else the text in `.cls`, else that in `.txt`, unless most
    texts differ, as captions do; without all of these it is the folder in the name of the member. The source is the
    entry "source" (or "url", from which video2dataset cut its clips) of the JSON, else tar file and key. The split is
    the entry "split", else that which the name of the tar file or of its folder begins with.

    Args:
        root: A tar file, or a folder or prefix of a server that holds tar files.
    Raises:
        InputError: there is no tar file, or none can be read.
    """
    return of_shards(shard_files(root), root)


def shard_files(root: Path) -> list[Path]:
    """Returns the tar files of a root, sorted. Raises InputError if there is none."""
    if is_tar(root):
        return [root]
    found = remote_files(root) if is_remote(root) else _below(root)
    if not (shards := sorted(path for path in found if is_tar(path))):
        packed = next((path for path in found if path.name.endswith((".tar.gz", ".tgz", ".tar.zst"))), None)
        advice = f"; {packed.name} is compressed, so that no part of it can be read alone: unpack it" if packed else ""
        raise InputError(f"ROOT: expected tar files (.tar) in {text_of(root)!r}, got none{advice}")
    return shards


def of_shards(shards: Sequence[Path], root: Path) -> Listing:
    """Returns the videos of tar files, as `list_shards` does; their names are stated relative to `root`."""
    rows: list[tuple[Path, Sample, Member, dict[str, str]]] = []
    problems: list[Problem] = []
    others: Counter[str] = Counter()
    first: dict[str, Member] = {}  # a video of the first sample of each key
    with ThreadPoolExecutor(READERS) as pool:
        for file, (samples, found, left) in zip(shards, pool.map(_read_shard, shards), strict=True):
            problems += found
            others += left
            for sample, facts in samples:
                if (before := first.setdefault(sample.key, sample.videos[0])) != sample.videos[0]:
                    reason = (
                        f"has the key {sample.key!r} of an earlier sample in {text_of(before.file)}; both are listed"
                    )
                    problems += [Problem(member_path(video), "repeated_key", reason) for video in sample.videos]
                rows += [(file, sample, video, facts) for video in sample.videos]
    captions = {facts["caption"] for *_, facts in rows if facts.get("caption")}
    as_class = bool(captions) and 2 * len(captions) <= len(rows)
    named = any(facts.get("label") or (as_class and facts.get("caption")) for *_, facts in rows)
    videos = [_listed(file, sample, video, facts, root, as_class, named) for file, sample, video, facts in rows]
    videos.sort(key=lambda item: item.label)
    labels = sorted({item.label for item in videos} - {""})
    return Listing(videos, labels, problems, _levels(named, as_class, captions, labels), dict(others))


def _levels(named: bool, as_class: bool, captions: set[str], labels: list[str]) -> str:
    if named:
        texts = " and text" if as_class else ""
        return f"the class is that in the JSON{texts} beside the video"
    where = "the folder in the name of the member is the class" if labels else "nothing names a class"
    return where + ("; the texts beside the videos differ, so they are taken as captions" if captions else "")


def _listed(
    file: Path, sample: Sample, video: Member, facts: dict[str, str], root: Path, as_class: bool, named: bool
) -> Listed:
    folder = PurePosixPath(sample.key).parts[:1] if "/" in sample.key else ()
    label = facts.get("label") or (facts.get("caption", "") if as_class else "")
    if not named:
        label = "".join(folder)
    file = Path(plain_name(file))
    shard = file.relative_to(root).as_posix() if file.is_relative_to(root) and file != root else file.name
    source = facts.get("source") or f"{shard}/{sample.key}"
    named_split = split_in(PurePosixPath(shard).parts[0]) if "/" in shard else ""
    split = facts.get("split") or named_split or split_in(file.stem)
    return Listed(member_path(video), label, source, split)


def _read_shard(file: Path) -> tuple[list[tuple[Sample, dict[str, str]]], list[Problem], Counter[str]]:
    """Returns the samples of a tar file that have a video, with what is written beside each; problems; and the number
    of other members by suffix."""
    samples: list[Sample] = []
    problems: list[Problem] = []
    others: Counter[str] = Counter()
    try:
        for member in members(file, others):
            _add(samples, member, others)
    except OSError as error:
        kind = "damaged_shard" if samples else "unreadable_shard"
        more = f"; the {len(samples):,} samples before are listed" if samples else ""
        if not samples and isinstance(error.__cause__, tarfile.TarError) and (told := what_it_is(file)):
            more = f"; it {told}"
        problems.append(Problem(file, kind, f"{error.strerror or error}{more}"))
    found: list[tuple[Sample, dict[str, str]]] = []
    for sample in samples:
        if not sample.videos:
            what = ", ".join(sorted(sample.texts))
            name = next(iter(sample.texts.values())).name
            problems.append(Problem(file, "no_video", f"holds {name!r} ({what}) without a video of this key"))
            continue
        facts, wrong = _facts(sample)
        problems += [Problem(member_path(sample.videos[0]), "bad_text", reason) for reason in wrong]
        found.append((sample, facts))
    return found, problems, others


def _add(samples: list[Sample], member: Member, others: Counter[str]) -> None:
    """Adds a member to the last sample, or to a new one if its key or its name begins one."""
    suffix = PurePosixPath(member.name).suffix.lower()
    named = _KEY.fullmatch(member.name)
    is_video = suffix in VIDEO_SUFFIXES
    if named is None or not (is_video or suffix in (CLASS, CAPTION, FACTS)):
        others[suffix or member.name] += 1
        return
    last = samples[-1] if samples else None
    held = [] if last is None else [*last.videos, *last.texts.values()]
    if last is None or last.key != named[1] or member.name in {other.name for other in held}:
        samples.append(last := Sample(named[1]))
    if is_video:
        last.videos.append(member)
    else:
        last.texts[suffix] = member


def _facts(sample: Sample) -> tuple[dict[str, str], list[str]]:
    """Returns label, caption, source and split as they are written beside a video, and what is wrong with them."""
    facts: dict[str, str] = {}
    wrong = []
    for suffix, member in sample.texts.items():
        try:
            text = _text(member)
            if suffix == FACTS:
                facts |= dict(_entries(json.loads(text)))
            else:
                facts.setdefault("label" if suffix == CLASS else "caption", " ".join(text.split()))
        except (OSError, ValueError) as error:
            wrong.append(f"{member.name!r} beside it is not used: {getattr(error, 'strerror', None) or error}")
    return facts, wrong


def _text(member: Member) -> str:
    if member.size > LONGEST_TEXT:
        raise ValueError(f"expected a text of at most {LONGEST_TEXT:,} bytes, got {member.size:,}")
    return TAR.read_range(member_path(member), 0, member.size).decode("utf-8-sig")


def _entries(found: Any) -> Iterator[tuple[str, str]]:
    """Yields label, source and split of a JSON object. Raises ValueError for what is no object, or no name."""
    if not isinstance(found, dict):
        raise ValueError(f"expected a JSON object, got {type(found).__name__}")
    for name, keys in {"label": ("label", "class"), "source": ("source", "url"), "split": ("split",)}.items():
        value = next((found[key] for key in keys if found.get(key) is not None), None)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise ValueError(f"expected {name!r} to be a name or a number, got {json.dumps(value)[:40]}")
        text = " ".join(str(value).split())
        yield name, split_name(text) if name == "split" else text


def _below(root: Path) -> list[Path]:
    """Returns the files below a folder."""
    return [folder / name for folder, _, names in walked(root) for name in names]
