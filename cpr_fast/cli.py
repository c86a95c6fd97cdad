"""The command line: `cpr-fast COMMAND …` or `python -m cpr_fast COMMAND …`.

Tables and logs go to stderr when `--json` asks for one JSON object on stdout. Exit code 0 on success, 2 for bad
input (one line that names it), 1 for any other failure (with its traceback), 128 + N for a run that signal N stopped
after it saved. Each command imports what it needs,
so `--help` is quick.
"""

from __future__ import annotations

import json as json_module
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from .errors import InputError
from .evaluate.recipe import RecipeName
from .interrupt import Interrupted

CheckpointFiles = Annotated[
    tuple[str, ...],
    tyro.conf.Positional,
    tyro.conf.arg(metavar="CHECKPOINT", help="Of `pretrain` or `import-checkpoint`: FILE, or one per view, VIEW=FILE."),
]
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
Json = Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help="Print one JSON object on stdout.")]


def quickstart(out: Path = Path("runs/quickstart"), *, seed: int = 0, json: Json = False) -> None:
    """The main job on the embedded default: videos, flow, InfoNCE start, CPR, retrieval, report.

    Args:
        out: Folder of the run; a finished part found there is not done again.
        seed: Seed of the training; the videos are the same for every seed.
    """
    from .quickstart import quickstart as run

    _show(run(out, seed=seed), json)


def synth(
    out: tyro.conf.Positional[Path], *, classes: int = 12, videos: int = 24, seed: int = 0, json: Json = False
) -> None:
    """Write encoded videos of synthetic actions, with siblings and a source-disjoint train/test split.

    Args:
        out: Folder to write; OUT/index.csv lists the videos.
        classes: Number of classes (scene kind x motion programme).
        videos: Videos of each class.
        seed: Seed of every draw.
    """
    from .data.synthetic import write_synthetic

    _show({"index": str(write_synthetic(out, classes=classes, videos=videos, seed=seed, progress=True))}, json)


def index(
    root: tyro.conf.Positional[Path],
    *,
    out: Path,
    layout: Literal["folders", "ucf101", "hmdb51", "kinetics", "coclr", "lmdb"] = "folders",
    splits: Path | None = None,
    split: int = 1,
    class_order: Literal["official", "alphabetical"] = "official",
    flow_lmdb: Path | None = None,
    verify: Flag = False,
    no_verify: Flag = False,
    transcode: Path | None = None,
    short_side: int = 256,
    min_frames: int = 0,
    shard: str = "0/1",
    json: Json = False,
) -> None:
    """List and probe the videos of a data set; names what is broken, empty, short, rotated or of variable rate.

    What is found is written beside the index as <name>.report.json. Resumable.

    Args:
        root: Folder of the data set, or an LMDB file.
        out: The index (CSV) to write.
        layout: How the data set is laid out.
        splits: Folder of the split lists (all layouts but folders; optional for lmdb).
        split: Number of the official split.
        class_order: The data set's own order of classes (HMDB51: that of CoCLR and CPR) or the alphabet's (IIC).
        flow_lmdb: LMDB file of the flow of the same videos.
        verify: Decode every video whole, as is done by default below 10,000 videos.
        no_verify: Probe packets only, as is done by default from 10,000 videos on.
        transcode: Write every video anew (H.264, short groups of pictures, upright) below this folder and list that.
        short_side: Largest short side of transcoded videos, pixels.
        min_frames: Leave out videos with fewer frames.
        shard: i/n: probe the i-th of n shares, 0 <= i < n; the shard that ends last writes the index.
    """
    from .data.build import IndexOptions, write_index

    if verify and no_verify:
        raise InputError("--verify, --no-verify: expected one of them, got both")
    whole = True if verify else False if no_verify else None
    options = IndexOptions(layout, splits, split, class_order, flow_lmdb, whole, transcode, short_side, min_frames,
                           _parse_shard(shard))  # fmt: skip
    report = write_index(root, out, options, progress=True)
    if not json and report.get("problems"):  # all of them are in the report
        report |= {"problems": report["problems"][:20]}
    _show(report, json)


def flow(
    index: tyro.conf.Positional[Path],
    *,
    out: Path,
    storage: Literal["video", "lmdb"] = "video",
    device: str = "cpu",
    shard: str = "0/1",
    json: Json = False,
) -> None:
    """TV-L1 flow of every video of an index; resumable. Fills the index's flow_path column.

    A video that gives no flow is named and left out; the next run tries it again.

    Args:
        index: The index (CSV).
        out: Folder of the flow videos, or the LMDB file.
        storage: A video for each video, or JPEG records in one LMDB file in CoCLR's format. A shard of the latter has a
            file of its own, OUT.i-of-n.lmdb; a run without --shard then makes one file of them all.
        device: Where the flow is computed: cpu, cuda or cuda:N. Decoding and encoding stay on the CPU.
        shard: i/n: this process does the i-th of n shares of the videos, 0 <= i < n.
    """
    from .data.flow import write_flow

    report = write_flow(index, out, storage=storage, device=device, shard=_parse_shard(shard), progress=True)
    if not json:  # all of them are in the log
        report |= {"problems": report["problems"][:20]}
    _show(report, json)


def pretrain(
    config: tyro.conf.Positional[Path],
    *,
    resume: bool = False,
    auto_resume: bool = False,
    dump_memory: bool = False,
    json: Json = False,
) -> None:
    """Pretrain as a config says; any setting can be overridden: `--section.key value`.

    `cpr-fast pretrain CONFIG.toml --help` lists the settings with the file's values. Under `torchrun` every
    process trains on its share of a batch.

    Args:
        config: The TOML file.
        resume: Continue from the run folder's last checkpoint.
        auto_resume: Continue if there is one, else start: for jobs that are requeued.
        dump_memory: Write RUN/memory/cycle-N.npz after every epoch, for `cpr-fast mine`; as --run.dump-memory.
    """
    raise InputError(f"config: expected a .toml file, got {str(config)!r}")  # main() takes those to _pretrain


def retrieve(
    checkpoint: CheckpointFiles,
    *,
    index: tuple[Path, ...],
    protocol: Literal["train_test", "leave_source_out"] = "train_test",
    recipe: RecipeName = "paper",
    clips: int | None = None,
    crops: Literal[1, 5, 10] = 1,
    cache: bool = True,
    json: Json = False,
) -> None:
    """Nearest-neighbour retrieval R@1, 5, 10, 20, 50 of a checkpoint's encoders, per view and two-stream.

    The results join the metrics of the run that the checkpoint lies in, for `report`. Under `torchrun` the processes
    share out the videos.

    Args:
        index: The index (CSV) of every official split, one or several: several give means and deviations.
        protocol: Test split against train split, or every video against all others but its own source's.
        recipe: paper: nothing random at test time. coclr: with the colour jitter that the released code leaves on.
            iic: 10 clips, max-pooled feature maps, no centring.
        clips: Uniform windows per video; by default those of the recipe (paper, coclr: all, overlapping by half).
        crops: Centre, five or ten crops of every window.
        cache: Keep features beside the checkpoint and reuse them.
    """
    from .evaluate.results import run_of
    from .evaluate.retrieval import retrieve as run

    result = run(
        checkpoint, index, protocol=protocol, recipe=recipe, run_dir=run_of(checkpoint), clips_per_video=clips,
        crops=crops, cache=cache, progress=True,
    )  # fmt: skip
    _show_once(result, json)


def probe(
    checkpoint: CheckpointFiles,
    *,
    index: tuple[Path, ...],
    recipe: RecipeName = "paper",
    inputs: Literal["features", "clips"] | None = None,
    clips: int | None = None,
    crops: Literal[1, 5, 10] = 1,
    seeds: tuple[int, ...] = (0,),
    epochs: int | None = None,
    lr: float | None = None,
    batch_size: int | None = None,
    config: Path | None = None,
    json: Json = False,
) -> None:
    """Linear probe of a checkpoint's frozen encoders, per view and two-stream: accuracy, per class, confusion matrix.

    The result is written into the run's folder `evaluations` and joins its metrics, for `report`.

    Args:
        index: The index (CSV) of every official split, one or several.
        recipe: paper: the test split is used once, at the end. coclr: the best epoch on the test split, and colour
            jitter at test time. iic: 10 clips of max-pooled feature maps.
        inputs: One stored feature per video (the default), or augmented clips, decoded in every epoch.
        clips: Uniform windows per video; by default those of the recipe.
        crops: Centre, five or ten crops of every window.
        seeds: Several give an interval over them; one gives the bootstrap's over sources.
        epochs: Overrides the config; its milestones move along.
        lr: Overrides the config.
        batch_size: Overrides the config.
        config: TOML file whose section [probe] is taken in place of the checkpoint's.
    """
    import dataclasses

    settings = _classifier_settings("probe", checkpoint, config)
    if inputs == "clips" and settings.inputs == "features":
        settings = dataclasses.replace(settings, inputs=inputs, lr=0.1, batch_size=16)
    elif inputs:
        settings = dataclasses.replace(settings, inputs=inputs)
    _classify("probe", checkpoint, index, recipe, clips, crops, seeds, settings, json,
              epochs=epochs, lr=lr, batch_size=batch_size)  # fmt: skip


def finetune(
    checkpoint: CheckpointFiles,
    *,
    index: tuple[Path, ...],
    recipe: RecipeName = "paper",
    clips: int | None = None,
    crops: Literal[1, 5, 10] = 10,
    seeds: tuple[int, ...] = (0,),
    epochs: int | None = None,
    lr: float | None = None,
    backbone_lr: float | None = None,
    layer_decay: float | None = None,
    dropout: float | None = None,
    batch_size: int | None = None,
    config: Path | None = None,
    json: Json = False,
) -> None:
    """Finetune a checkpoint's encoders, per view and two-stream: accuracy, per class, confusion matrix.

    Started again, it goes on from the last finished epoch, or from the step at which SIGTERM or SIGUSR1 stopped it. The
    result is written into the run's folder `evaluations` and joins its metrics, for `report`. Under `torchrun` every
    process trains on its share of a batch and tests its share of the videos.

    Args:
        index: The index (CSV) of every official split, one or several.
        recipe: paper: the test split is used once, at the end. coclr: the best epoch on the test split, and colour
            jitter at test time. iic: 10 clips per test video.
        clips: Uniform windows per test video; by default those of the recipe (paper, coclr: all).
        crops: Centre, five or ten crops of every window; the smaller sets are told as well.
        seeds: Several give an interval over them; one gives the bootstrap's over sources.
        epochs: Overrides the config; its milestones move along.
        lr: Of the classifier. Overrides the config, as do the following.
        backbone_lr: Of the backbone's last layer; 0 freezes the backbone. CoCLR's code: 1e-4.
        layer_decay: Each layer learns at this share of the rate of the one above it.
        dropout: Of the pooled features.
        batch_size: Clips of a step, of each process.
        config: TOML file whose section [finetune] is taken in place of the checkpoint's.
    """
    settings = _classifier_settings("finetune", checkpoint, config)
    _classify("finetune", checkpoint, index, recipe, clips, crops, seeds, settings, json,
              epochs=epochs, lr=lr, backbone_lr=backbone_lr, layer_decay=layer_decay, dropout=dropout,
              batch_size=batch_size)  # fmt: skip


def search(
    queries: tyro.conf.Positional[tuple[Path, ...]],
    *,
    index: Path,
    checkpoint: tuple[str, ...],
    top: int = 10,
    out: Path | None = None,
    recipe: RecipeName = "paper",
    clips: int | None = None,
    cache: bool = True,
    json: Json = False,
) -> None:
    """Search your own videos: what an index holds that is most like each query, as a list and a contact sheet.

    Args:
        queries: Video files; they need no class and no place in an index.
        index: The index (CSV) to search.
        checkpoint: Of `pretrain` or `import-checkpoint`: FILE, or one per view, VIEW=FILE.
        top: How many videos to list.
        out: Folder of the contact sheets, QUERY.jpg; by default the folder search of the checkpoint's run.
        recipe: As of `retrieve`, whose stored features are found again.
        clips: Uniform windows per video; by default those of the recipe.
        cache: Keep the index's features beside the checkpoint and reuse them.
    """
    from .evaluate.results import checkpoint_files, home
    from .evaluate.search import search as run
    from .report.contact_sheet import write_contact_sheet

    folder = out or home(checkpoint_files(checkpoint)[0][1]) / "search"
    result = run(
        queries, index, checkpoint, top=top, recipe=recipe, clips_per_video=clips, cache=cache, progress=True,
        draw=lambda name, query, found: write_contact_sheet(folder / f"{name}.jpg", query, found),
    )  # fmt: skip
    if json:
        _show(result, json)
        return
    from rich.console import Console
    from rich.table import Table

    for query in result["queries"]:
        table = Table("", "similarity", "label", "path", title=f"{query['path']} → {query['picture']}")
        for row in query["results"]:
            table.add_row(str(row["rank"]), f"{row['similarity']:.3f}", row["label"], row["path"])
        Console().print(table)


def mine(
    features: tyro.conf.Positional[Path],
    *,
    stages: tuple[int, ...] = (1, 3, 5, 7),
    ratio: tuple[float, ...] = (0.5,),
    top_k: tuple[int, ...] = (5,),
    query_view: tuple[Literal["rgb", "flow"], ...] = ("rgb",),
    order: tuple[str, ...] = (),
    details: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    raw: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    heatmap: Path | None = None,
    json: Json = False,
) -> None:
    """The mining lab: PMR, CMR and mining R@1 of any cascade on stored two-view features; sweeps every combination.

    Args:
        features: An .npz file of the arrays rgb, flow [N, D], label, group [N]; rows of the same label and the same
            group are siblings, never mined.
        stages: Numbers of stages.
        ratio: Shares of the rows that survive each stage before the last.
        top_k: How many entries the last stage keeps.
        query_view: The views whose training is imitated; the ranking ends in the other one.
        order: Views of the stages as letters, "frf" = flow, RGB, flow; in place of --stages and --query-view.
        details: Also what each stage keeps and loses, view agreement and mutual neighbours (these need no labels).
        raw: Take the features as they are, neither centred nor L2-normalised.
        heatmap: A PNG to write: PMR over stages and ratio.
    """
    from .evaluate.mining_lab import load_two_view_features, results_table, survivors_table, sweep

    data = load_two_view_features(features, raw=raw)
    rows = sweep(
        data, stages=stages, ratios=ratio, top_ks=top_k, query_views=query_view, orders=order, details=details,
        progress=True,
    )  # fmt: skip
    if heatmap is not None:
        from .report.heatmap import write_heatmap

        write_heatmap(rows, heatmap)
    if json:
        _show({"features": str(features), "rows": len(data.labels), "results": rows}, json)
        return
    from rich.console import Console

    Console().print(results_table(rows))
    if details and rows[0]["pmr"] is not None:
        Console().print(survivors_table(rows))


def report(runs: tyro.conf.Positional[tuple[Path, ...]], *, out: Path | None = None, json: Json = False) -> None:
    """One self-contained HTML page of one or more run folders.

    Args:
        runs: The run folders.
        out: The page to write; report.html in the first run folder by default.
    """
    from .report.page import write_report

    if not runs:
        raise InputError("runs: expected at least one run folder, got none")
    _show({"report": str(write_report(runs, out or runs[0] / "report.html"))}, json)


def reproduce(
    table: tyro.conf.Positional[str | None] = None,
    *,
    index: Path | None = None,
    rows: tuple[str, ...] = (),
    seeds: tuple[int, ...] = (0,),
    scale: float = 1.0,
    settings: Path | None = None,
    hmdb51: Path | None = None,
    k400: Path | None = None,
    out: Path = Path("runs/reproduce"),
    json: Json = False,
) -> None:
    """Train and evaluate the rows of a table of the paper, beside its numbers; without arguments: list the tables.

    A finished row and seed is a card in OUT/cards and is not run again; a stopped one goes on.

    Args:
        table: Its name or number.
        index: The index (CSV) that stands for UCF101: videos with labels, a train and a test split, and flow.
        rows: Which rows; all by default.
        seeds: Of the pretraining and the classifiers; several give a standard error.
        scale: Share of the epochs; the result says it.
        settings: TOML file whose settings replace those of every recipe (data, model, memory, optim, probe, finetune).
        hmdb51: The index that stands for HMDB51; without it what is evaluated there is left out.
        k400: The index that stands for Kinetics-400, likewise.
        out: Folder of runs, cards and tables; tables share the runs that they have in common.
    """
    from .reproduce import Scale, list_tables, read_settings
    from .reproduce import reproduce as run

    if table is None:
        print(list_tables())
        return
    if index is None:
        raise InputError("index: expected the index that stands for UCF101, got none")
    smaller = Scale(scale, read_settings(settings) if settings else {})
    result = run(table, index, rows=rows, seeds=seeds, scale=smaller, hmdb51=hmdb51, k400=k400, out=out,
                 progress=True)  # fmt: skip
    if json:
        _show(result, json)
    else:
        print(Path(result["markdown"]).read_text(encoding="utf-8"))


def import_checkpoint(
    file: tyro.conf.Positional[Path], *, out: Path, view: Literal["rgb", "flow"] = "rgb", json: Json = False
) -> None:
    """Read a checkpoint of CoCLR, CPR, IIC or MIL-NCE's S3D; reports what matched, what is missing and what is unused.

    The result serves `retrieve`, `probe`, `finetune`, `export`, and `pretrain --model.init.rgb OUT`.

    Args:
        file: The published checkpoint.
        out: The checkpoint to write.
        view: What the file's (query) encoder looks at.
    """
    from .foreign import import_checkpoint as run

    _show(run(file, out, view=view), json)


def export(
    checkpoint: tyro.conf.Positional[Path],
    *,
    out: Path,
    to: Literal["safetensors", "onnx", "coclr"] = "safetensors",
    view: Literal["rgb", "flow"] | None = None,
    json: Json = False,
) -> None:
    """Write a checkpoint's encoders for other programs.

    Args:
        checkpoint: A checkpoint of `pretrain` or `import-checkpoint`.
        out: The file to write.
        to: safetensors (every view), onnx (one view, any batch size), or a checkpoint of CoCLR's and CPR's own code.
        view: The encoder of onnx and coclr; the one that trained last by default.
    """
    from .export import export as run

    _show(run(checkpoint, out, to=to, view=view), json)


def show_sample(
    index: tyro.conf.Positional[Path],
    *,
    out: Path,
    position: Annotated[int, tyro.conf.arg(name="index")] = 0,
    epoch: int = 0,
    config: Path | None = None,
    views: tuple[Literal["rgb", "flow", "residual"], ...] = ("rgb",),
    json: Json = False,
) -> None:
    """Write the exact clips that a video gives in an epoch as a picture (.png) or a video (.mp4).

    Args:
        index: The index (CSV).
        out: The file to write.
        position: Which video: its place in the index, or, with a config, in the config's split of it.
        epoch: Which epoch of the run.
        config: The run's TOML file or config.json, for its data settings and seed; by default those of no file.
        views: What to show of each clip.
    """
    from .config import Config, load
    from .data.index import Index
    from .data.show import show_sample as run

    settings = Config() if config is None else load(config)
    videos = Index.load(index, require_flow=settings.data.flow == "stored")
    if config is not None:
        videos = videos.select(settings.data.split)
    _show(
        run(videos, settings.data, seed=settings.run.seed, epoch=epoch, position=position, out=out, views=views), json
    )


def doctor(
    index: tyro.conf.Positional[Path | None] = None,
    *,
    config: Path | None = None,
    device: str = "auto",
    seconds: float = 60.0,
    json: Json = False,
) -> None:
    """What works on this machine, what is wrong with the data, and where the time of a training step goes.

    Exit code 1 where something is broken.

    Args:
        index: An index (CSV), whose data is then looked at and a step's time broken down.
        config: The TOML file whose settings the breakdown takes.
        device: "auto", "cpu" or "cuda".
        seconds: How long the breakdown may take; 0 leaves it out.
    """
    import torch

    from .config import Config, load
    from .doctor import doctor as run

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = Config() if config is None else load(config)
    result = run(index, settings, device=torch.device(device), seconds=seconds)
    if json:
        _show(result, json)
    else:
        from .doctor import show

        show(result)
    if any(finding["level"] == "error" for finding in result["findings"]):
        raise SystemExit(1)


COMMANDS: dict[str, Callable[..., None]] = {
    command.__name__.replace("_", "-"): command
    for command in (
        quickstart,
        synth,
        index,
        flow,
        pretrain,
        retrieve,
        probe,
        finetune,
        search,
        mine,
        report,
        reproduce,
        import_checkpoint,
        export,
        show_sample,
        doctor,
    )
}


# Paths that are not what a command expected; the message of each names its path.
PATH_ERRORS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        if arguments[:1] == ["pretrain"] and any(argument.endswith(".toml") for argument in arguments):
            _pretrain(arguments[1:])
        else:
            tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="cpr-fast", args=arguments)
    except (InputError, *PATH_ERRORS) as error:
        print(f"cpr-fast: {error}", file=sys.stderr)
        return 2
    except Interrupted as stopped:
        from . import distributed

        if distributed.is_main():
            how = "go on with --resume" if arguments[0] == "pretrain" else "the same command goes on"
            print(f"cpr-fast: {stopped}; {how}", file=sys.stderr)
        distributed.finish()
        return 128 + stopped.signum
    return 0


def _pretrain(arguments: list[str]) -> None:
    """`pretrain` with its overrides: the file's values are the defaults of a parser over every setting."""
    from .config import Config, load

    path = next(argument for argument in arguments if argument.endswith(".toml"))
    overrides = [argument for argument in arguments if argument not in (path, "--resume", "--auto-resume", "--json")]
    overrides = ["--run.dump-memory" if argument == "--dump-memory" else argument for argument in overrides]
    config = tyro.cli(Config, default=load(path), args=overrides, prog=f"cpr-fast pretrain {path}")

    from .pretrain.loop import pretrain as run

    folder = run(config, resume="auto" if "--auto-resume" in arguments else "--resume" in arguments)
    _show_once({"run": str(folder)}, "--json" in arguments)


def _classifier_settings(task: str, checkpoint: tuple[str, ...], config: Path | None) -> Any:
    """The section `task` of the file `config`, else of the first checkpoint's config."""
    from .checkpoint import load_checkpoint
    from .config import Config, load
    from .evaluate.results import checkpoint_files

    if config:
        return getattr(load(config), task)
    return getattr(Config.from_dict(load_checkpoint(checkpoint_files(checkpoint)[0][1])["config"]), task)


def _classify(
    task: Literal["probe", "finetune"],
    checkpoint: tuple[str, ...],
    index: tuple[Path, ...],
    recipe: RecipeName,
    clips: int | None,
    crops: int,
    seeds: tuple[int, ...],
    settings: Any,
    json: bool,
    **overrides: Any,
) -> None:
    """`probe` and `finetune`; without `json` what fits a screen: no confusion matrix, no list of classes."""
    from .config import override_classifier
    from .evaluate.classify import classify
    from .evaluate.results import run_of

    settings = override_classifier(task, settings, **overrides)
    result = classify(
        checkpoint, index, task=task, settings=settings, recipe=recipe, clips_per_video=clips, crops=crops,
        seeds=seeds, run_dir=run_of(checkpoint), progress=True,
    )  # fmt: skip
    if not json:
        long = ("per_class", "confusion")
        result["results"] = [{key: v for key, v in row.items() if key not in long} for row in result["results"]]
    _show_once(result, json)


def _parse_shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise InputError(f"--shard: expected i/n with 0 <= i < n, got {text!r}")
    return int(index), int(count)


def _show_once(result: dict[str, Any], json: bool) -> None:
    """`_show` by the first process of those that torchrun started; all of them part."""
    from . import distributed

    if distributed.is_main():
        _show(result, json)
    distributed.finish()


def _show(result: dict[str, Any], json: bool) -> None:
    if json:
        print(json_module.dumps(result))
        return
    from rich.console import Console

    Console().print_json(data=result)
