"""Checks of an index: rows that cannot be used, damaged or slow videos, labels, splits, sources, flow, memory size."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from cpr_fast.config import Config
from cpr_fast.data.files.access import storage_of
from cpr_fast.data.flow.names import flow_command
from cpr_fast.data.index.assemble import SHORT
from cpr_fast.data.index.index import MIN_VIDEOS, Index, IndexFileError, NotAnIndexError, Video, too_few
from cpr_fast.data.index.layouts import HMDB51_CLASSES
from cpr_fast.data.index.summary import index_command, report_path
from cpr_fast.data.storage.media import container, is_pictures, read_frames
from cpr_fast.data.video.container import VideoError
from cpr_fast.data.video.packets import slice_packets
from cpr_fast.data.video.probe import probe_video
from cpr_fast.doctor.findings import Finding
from cpr_fast.doctor.machine import free_gib
from cpr_fast.errors import InputError
from cpr_fast.pretrain.run.checks import check_run, plan_cycles
from cpr_fast.wording import counted

SAMPLE, SAMPLE_S = 12, 10.0  # videos decoded to find damage, at least; seconds within which more are decoded
NAMED = 3  # examples of each kind of problem
FPS_TOLERANCE = 0.01  # relative: 29.97 may be written as 30
LONG = 64  # frames: up to this length, decoding from the start is fast


def load_index(index: Path, findings: list[Finding]) -> Index | None:
    """Returns the usable rows of the index, or None if there is none; every row that is not usable is an error."""
    again = index_command(index)
    advice = f"create it again: {again}" if again else "correct it, or create it again with `cpr-fast index`"
    skipped: list[IndexFileError] = []
    try:
        videos = Index.load(index, require_flow=False, skipped=skipped)
    except (InputError, OSError, ValueError) as error:
        if isinstance(error, NotAnIndexError):  # advice to write the index to this path would destroy the file
            advice = "name the index of the videos; `cpr-fast index FOLDER --out index.csv` makes one"
        findings.append(Finding("error", str(error), advice, "fails"))
        return None
    if skipped:
        more = f"; and {len(skipped) - NAMED} more" if len(skipped) > NAMED else ""
        text = "; ".join(str(error) for error in skipped[:NAMED])
        rows = f"{counted(len(skipped), 'row')} of the index {'is' if len(skipped) == 1 else 'are'}"
        findings.append(Finding("error", f"{rows} bad: {text}{more}", advice, "fails"))
    if not len(videos):
        findings.append(Finding("error", f"{index}: no video is left", advice, "fails"))
    return videos if len(videos) else None


def views_read(config: Config) -> tuple[str, ...]:
    """Returns the views that the cycles of a config read, without repeats."""
    return tuple(dict.fromkeys(v for cycle in config.schedule.cycles for v in cycle.views(shared=config.model.shared)))


def check_index(index: Path, videos: Index, config: Config | None, findings: list[Finding]) -> dict[str, Any]:
    """Returns the properties of the index and the results of decoding a sample of its videos."""
    sources = Counter(video.source for video in videos)
    sampled, damaged, stale, whole = _sample(videos)
    facts = {
        "videos": len(videos),
        "splits": dict(Counter(video.split for video in videos)),
        "classes": len(videos.classes),
        "class_order": _class_order(videos.classes),
        "unlabelled": int((videos.labels < 0).sum()),
        "sources": len(sources),
        "videos_with_siblings": sum(count for count in sources.values() if count > 1),
        "sizes": len({(video.width, video.height) for video in videos}),
        "short": sum(video.num_frames <= SHORT for video in videos),
        "single_frames": sum(video.num_frames == 1 for video in videos),
        "without_flow": sum(video.flow_path is None and video.num_frames > 1 for video in videos),
        "sampled": sampled,
        "damaged": damaged,
        "stale": stale,
        "decodable": len(damaged) < sampled,
        "from_start": whole,
        "disk_free_gib": free_gib(container(videos[0].path).parent),
    }
    _check_sample(index, videos, facts, findings)
    _check_columns(index, videos, facts, config, findings)
    _check_labels_and_sources(videos, facts, findings)
    findings += _index_report(index)
    return facts


def decoded_from_start(
    index: Path, videos: Index, facts: dict[str, Any], breakdown: dict[str, Any] | None
) -> list[Finding]:
    """Returns the finding that the sampled videos have few key frames: advice to transcode them, unless the `breakdown`
    of a training step shows that their decoding costs no time."""
    number, sampled = facts["from_start"], facts["sampled"]
    if not number:
        return []
    text = (f"{number} of {counted(sampled, 'sampled video')} {'is' if number == 1 else 'are'} decoded from the start "
            "for every clip (an AVI file, or a single key frame)")  # fmt: skip
    if breakdown is not None and breakdown["bottleneck"] == "step":
        return [Finding("ok", f"{text}; that costs no time here, because the network takes longer", effect="time")]
    return [Finding("warning", text, f"to write copies with many key frames: {_transcoding(index, videos)}", "time")]


def _check_sample(index: Path, videos: Index, facts: dict[str, Any], findings: list[Finding]) -> None:
    sampled, damaged = facts["sampled"], facts["damaged"]
    if damaged:
        text = "; ".join(f"{row['path']}: {row['reason']}" for row in damaged[:NAMED])
        verb = "is" if len(damaged) == 1 else "are"
        # Commands report a video that does not decode and leave it out; they fail where none is left.
        some = len(damaged) < sampled
        does = ": training replaces these videos by others, and evaluation leaves them out" if some else ""
        findings.append(Finding("warning" if some else "error",
                                f"{len(damaged)} of {counted(sampled, 'sampled video')} {verb} damaged{does}: {text}",
                                "to list every damaged video with its frames that decode, and to leave out those "
                                f"without any: {index_command(index, videos, verify='')}",
                                "results" if some else "fails"))  # fmt: skip
    elif not facts["stale"]:
        verb = "decodes" if sampled == 1 else "decode"
        findings.append(Finding("ok", f"{counted(sampled, 'sampled video')} {verb} to the last frame"))
    if stale := facts["stale"]:
        text = "; ".join(f"{row['path']}: {row['reason']}" for row in stale[:NAMED])
        verb = "differs" if len(stale) == 1 else "differ"
        findings.append(Finding("warning", f"{len(stale)} of {counted(sampled, 'sampled video')} {verb} from the "
                                f"index: {text}. "
                                "Commands rely on the index: they never read frames that it does not count, and "
                                "report and leave out a video with fewer frames than it counts, or of another size",
                                f"index them again: {index_command(index, videos)}", "results"))  # fmt: skip


def _transcoding(index: Path, videos: Index) -> str:
    """Returns the command that writes copies of the videos, and the index of these."""
    return index_command(index, videos, transcode=str(index.parent / "transcoded"))


def _check_columns(
    index: Path, videos: Index, facts: dict[str, Any], config: Config | None, findings: list[Finding]
) -> None:
    """Checks flow, lengths and frame sizes."""
    needs_flow = config is not None and config.data.flow == "stored" and "flow" in views_read(config)
    if facts["without_flow"] and facts["decodable"] and needs_flow:
        verb = "has" if facts["without_flow"] == 1 else "have"
        findings.append(Finding("warning", f"{facts['without_flow']} of {counted(facts['videos'], 'video')} {verb} no "
                                "flow, which the view \"flow\" of these settings needs",
                                f"{flow_command(index, videos)}, or data.flow = \"on_the_fly\" or \"vectors\", or the "
                                "view \"residual\"", "settings"))  # fmt: skip
    if facts["single_frames"]:
        verb = "has" if facts["single_frames"] == 1 else "have"
        findings.append(Finding("warning", f"{counted(facts['single_frames'], 'video')} {verb} a single frame: it "
                                "shows no motion, has no flow, and is repeated to the length of a clip",
                                index_command(index, videos, min_frames="2"), "results"))  # fmt: skip
    if facts["short"]:
        verb = "has" if facts["short"] == 1 else "have"
        findings.append(Finding("warning", f"{facts['short']} short: {counted(facts['short'], 'video')} {verb} {SHORT} "
                                "frames or fewer; CoCLR leaves them out",
                                index_command(index, videos, min_frames=str(SHORT + 1)), "results"))  # fmt: skip
    if facts["sizes"] > 100:
        text = f"the videos have {facts['sizes']:,} different frame sizes; DALI keeps hardware decoders for 100"
        findings.append(Finding("warning", text, _transcoding(index, videos), "time"))


def _check_labels_and_sources(videos: Index, facts: dict[str, Any], findings: list[Finding]) -> None:
    if facts["unlabelled"] == len(videos):
        advice = "pretraining needs none; `report` shows what the network finds similar, duplicated and odd"
        text = "no video has a label, so R@k, PMR, CMR, `probe` and `finetune` are not available"
        findings.append(Finding("ok", text, advice))
    elif facts["unlabelled"]:
        verb = "has" if facts["unlabelled"] == 1 else "have"
        findings.append(Finding("warning", f"{facts['unlabelled']} of {counted(len(videos), 'video')} {verb} no label",
                                "give them one, or expect evaluations to leave them out", "results"))  # fmt: skip
    if facts["classes"] == 1:
        findings.append(Finding("warning", "all labels are of one class: R@k, mAP, PMR and the accuracy of `probe` and "
                                "`finetune` are 100 % for any network, so they show nothing",
                                "label the videos with two classes or more, or index them without labels (`report` "
                                "then shows what the network finds similar)", "results"))  # fmt: skip
    if facts["sources"] == 1:
        findings.append(Finding("error", "all videos come from one source: `init` refuses them, a cascade has nothing "
                                "to mine and `retrieve` without a test split nothing to find, because both leave out "
                                "the clips of a query's own source",
                                "correct the column \"source\" of the index; an empty value makes each video its own "
                                "source", "fails"))  # fmt: skip
    splits: dict[str, set[str]] = {}
    for video in videos:
        splits.setdefault(video.split, set()).add(video.source)
    shared = splits.get("train", set()) & splits.get("test", set())
    if shared:
        names = ", ".join(sorted(shared)[:NAMED])
        verb = "has" if len(shared) == 1 else "have"
        text = (f"{counted(len(shared), 'source')} (recordings that videos were cut from) {verb} videos in both the "
                f"train and the test split: {names}")  # fmt: skip
        advice = "move them to one split: evaluations are too good otherwise"
        findings.append(Finding("warning", text, advice, "results"))


def _sample(videos: Index) -> tuple[int, list[dict[str, str]], list[dict[str, str]], int]:
    """Returns how many videos were drawn and decoded at three places, those that failed, those that the index describes
    wrongly, and how many of the others are decoded from their start for every clip."""
    sampled, damaged, stale, whole = 0, [], [], 0
    deadline = time.perf_counter() + SAMPLE_S
    for position in np.random.default_rng(0).permutation(len(videos)):
        if sampled >= SAMPLE and time.perf_counter() > deadline:
            break
        sampled += 1
        video = videos[int(position)]
        try:
            if differs := _difference(video):
                stale.append({"path": str(video.path), "reason": differs})
                continue
            _read_three_frames(video)
            whole += _is_sliced_whole(video)
        except VideoError as error:
            damaged.append({"path": str(error.path), "reason": error.reason})
        except Exception as error:  # the check reports every error instead of stopping at it
            damaged.append({"path": str(video.path), "reason": f"{type(error).__name__}: {error}"})
    return sampled, damaged, stale, whole


def _difference(video: Video) -> str:
    """Returns how a video file differs from its row in the index, "" if it does not, or if every frame is a
    picture of its own."""
    if is_pictures(video.path):
        return ""
    info = probe_video(video.path, decode=False)
    if info.num_frames != video.num_frames:  # of a damaged video the index counts those packets that decode
        info = probe_video(video.path)
    now, listed = ((v.num_frames, f"{v.width}x{v.height}") for v in (info, video))
    parts = []
    if now[0] != listed[0]:
        parts.append(f"{counted(now[0], 'frame')}, the index says {listed[0]:,}")
    if now[1] != listed[1]:
        parts.append(f"{now[1]} pixels, the index says {listed[1]}")
    if info.fps and abs(info.fps - video.fps) > FPS_TOLERANCE * info.fps:
        parts.append(f"{info.fps:.6g} frames per second, the index says {video.fps:.6g}")
    return " and ".join(parts)


def _read_three_frames(video: Video) -> None:
    parts = [(video.path, "rgb", video.num_frames)]
    parts += [(video.flow_path, "flow", video.num_frames - 1)] if video.flow_path and video.num_frames > 1 else []
    for path, view, frames in parts:
        read_frames(path, np.unique([0, frames // 2, frames - 1]), view, frames)


def _is_sliced_whole(video: Video) -> bool:
    """Returns whether decoding the last frames needs (nearly) the whole file."""
    if is_pictures(video.path) or video.num_frames <= LONG:
        return False
    last = np.arange(video.num_frames - 8, video.num_frames)
    packets, _ = slice_packets(video.path, last, video.num_frames)
    return len(packets) > 0.7 * storage_of(video.path).size(video.path)


def _class_order(classes: list[str]) -> str:
    """Returns the order that the numbers of the labels follow: classifiers in checkpoints depend on it."""
    official = [name for name in HMDB51_CLASSES if name in classes]
    if len(classes) > 1 and set(classes) <= set(HMDB51_CLASSES):
        if classes == official:
            return "HMDB51 as in CoCLR and CPR"
        return "HMDB51, alphabetical as in IIC" if classes == sorted(classes) else "HMDB51, neither order"
    return "alphabetical" if classes == sorted(classes) else "of the lists"


def _index_report(index: Path) -> list[Finding]:
    """Returns the problems that `cpr-fast index` counted, if its report is in the folder of the index."""
    try:
        counts = json.loads(report_path(index).read_text(encoding="utf-8"))["counts"]
        named = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    if not named:
        return []
    text = f"`cpr-fast index` reported these problems: {named}"
    return [Finding("warning", text, f"read {report_path(index)}", "results")]


def training_part(videos: Index, config: Config | None, findings: list[Finding]) -> Index | None:
    """Returns the videos of data.split, all videos if there is no such split, and checks the sizes of the config.

    Too few videos are an error without a config, because `init` refuses them (then None is returned), and a warning
    with one, as in `pretrain`. Without a config, the split is the one that pretraining reads by default.
    """
    split, train = _training_part(videos, config, findings)
    _check_splits(videos, findings)
    if reason := too_few(len(train), len({video.source for video in train}), split):
        if videos.source_count > 1 or len(train) < MIN_VIDEOS:  # else it is reported already
            level, consequence = ("error", "fails") if config is None else ("warning", "results")
            findings.append(Finding(level, f"too few videos for pretraining: {reason}",
                                    "add videos, then list them again with `cpr-fast index`", consequence))  # fmt: skip
        if config is None:
            return None
    if config is None:
        return train
    if len(train) < config.data.batch_size:
        findings.append(Finding("warning", f"data.batch_size = {config.data.batch_size} is larger than the number of "
                                f"training videos, {len(train)}",
                                f"set data.batch_size to {len(train)} or less", "settings"))  # fmt: skip
    else:
        _check_learning(train, config, findings)
    return train


def _training_part(videos: Index, config: Config | None, findings: list[Finding]) -> tuple[str, Index]:
    """Returns the split to train on, "" for all videos, and its videos."""
    if config is None:
        split, chosen = videos.training()
        return split, chosen
    split = config.data.split if videos.has_splits else ""
    try:
        train = videos.select_for_training(split)
    except IndexFileError:
        found = ", ".join(repr(name) for name in dict.fromkeys(video.split for video in videos))
        text = f"the index has no split {config.data.split!r} (data.split); its splits are {found}"
        findings.append(Finding("warning", text, "set data.split to one of them", "settings"))
        split, train = "", videos
    try:
        return split, train.long_enough(config.data)
    except IndexFileError as error:
        findings.append(Finding("warning", str(error), 'set data.short_videos to "keep"', "settings"))
        return split, train


def _check_splits(videos: Index, findings: list[Finding]) -> None:
    """Reports which of the splits train and test is missing, and what each command does or cannot do without it."""
    missing = [name for name in ("train", "test") if all(video.split != name for video in videos)]
    if not missing:
        return
    trained = "" if videos.has_splits else "training uses all videos, "
    text = (
        f"the index has no {' and no '.join(missing)} split: {trained}`retrieve` lets every video search among those "
        "of all other sources (protocol leave_source_out), and `probe` and `finetune` cannot run"
    )
    advice = (
        'to evaluate on videos that training has not seen, fill the column "split" with train and test, or index '
        "videos that lie in folders of these names"
    )
    findings.append(Finding("ok", text, advice))


def _check_learning(train: Index, config: Config, findings: list[Finding]) -> None:
    """Reports why a run with these settings would fail or learn little: the warnings of `pretrain` itself."""
    try:
        plans = plan_cycles(config, len(train), 1)
        warnings = check_run(config, train, plans, stored_flow=False)  # `_check_columns` checks the flow
    except InputError as error:
        findings.append(Finding("warning", str(error), "correct the recipe", "settings"))
        return
    for warning in warnings:
        text, mark, advice = warning.partition(". Set ")
        findings.append(Finding("warning", text, f"set {advice}" if mark else "", "results"))
    size = config.memory.size
    if config.memory.kind == "queue" and size > len(train) and all(plan.fill_share <= 1 for plan in plans):
        text = (f"memory.size = {size} is larger than the {counted(len(train), 'training video')}: the memory holds "
                f"every video {size / len(train):.1f} times on average")  # fmt: skip
        findings.append(Finding("warning", text, f"set memory.size to about {max(1, len(train) // 2)}", "results"))
