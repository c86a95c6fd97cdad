"""`cpr-fast reproduce TABLE`: trains and evaluates the recipes of a table of the paper on a given index.

A row of `published.toml` names its recipe in configs/. For each row, a chain of pretrainings is run: first the
InfoNCE pretraining that the recipe starts from, if any, then the cycles of the recipe. If the row reports an earlier
cycle, the chain ends with that cycle. Each cycle is a run that starts from the weights of the previous one, as it would
within a single run. Runs are named by a digest of everything they depend on. A run that several rows or tables need is
therefore trained once, and a stopped run is continued. The result of a row and seed is stored as a
card, and is not computed again.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from cpr_fast.config import READING, Config, load, override_classifier
from cpr_fast.config.load import decoded
from cpr_fast.data.index.index import Index
from cpr_fast.errors import InputError
from cpr_fast.evaluate.classify.classify import classify, load_split
from cpr_fast.evaluate.features.cache import digest
from cpr_fast.evaluate.features.recipe import RecipeName, default_recipe
from cpr_fast.evaluate.features.results import write_result
from cpr_fast.evaluate.retrieval.retrieve import retrieve
from cpr_fast.pretrain.run.loop import pretrain
from cpr_fast.report.sections.published import PublishedRow, PublishedTable, published_table, published_tables
from cpr_fast.runtime.files import replacing
from cpr_fast.runtime.metrics import environment, read_metrics
from cpr_fast.weights.checkpoint import LAST
from cpr_fast.wording import counted

CONFIGS = Path(__file__).parents[1] / "configs"
STARTS = ("infonce_ucf101",)  # recipes that other recipes start from, by the name of their checkpoint
FIXED = {"schedule": None, "mining": None, "loss": None, "data": ("index", "split"), "run": ("out", "seed")}
TASKS = {"probe": 1, "finetune": 10}  # number of crops per window; IIC's protocol uses one

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scale:
    """The scale of a reproduction relative to the paper's experiment.

    Attributes:
        epochs: Fraction of the epochs of every training, 0 < epochs <= 1; at least one epoch is trained.
        settings: Sections of a config that replace those of every recipe, as parsed from TOML.
    """

    epochs: float = 1.0
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.epochs <= 1:
            raise InputError(f"--scale: expected a share in (0, 1], got {self.epochs}")
        for section, values in self.settings.items():
            for key in values if isinstance(values, dict) else ():
                if section in FIXED and (FIXED[section] is None or key in FIXED[section]):
                    raise InputError(f"--settings: {section}.{key} is what the table's recipe decides; leave it out")

    @property
    def text(self) -> str:
        """Returns the scale in words, for readers of a result."""
        epochs = "all epochs of the paper" if self.epochs == 1 else f"{100 * self.epochs:.3g} % of the paper's epochs"
        changed = [f"{s}.{k} = {v}" for s, values in self.settings.items() for k, v in values.items()]
        return ", ".join([epochs, *changed])

    def apply(self, config: Config) -> Config:
        """Returns the config at this scale, with the batch of all published GPUs in one process."""
        values = config.to_dict()
        values["data"]["batch_size"] *= values["memory"]["shuffle_bn_groups"] or 1
        for section, changes in self.settings.items():
            values[section] = values.get(section, {}) | changes
        for cycle in values["schedule"]["cycles"]:
            epochs = max(1, round(self.epochs * cycle["epochs"]))
            moved = {max(1, round(self.epochs * milestone)) for milestone in cycle["milestones"]}
            cycle |= {"epochs": epochs, "milestones": sorted(m for m in moved if m < epochs)}
        scaled = Config.from_dict(values)
        tasks = {
            task: override_classifier(task, section, epochs=max(1, round(self.epochs * section.epochs)))
            for task in TASKS
            if self.epochs < 1 and (section := getattr(scaled, task))
        }
        return dataclasses.replace(scaled, **tasks)


@dataclass(frozen=True)
class Step:
    """One pretraining of a chain. `name` identifies everything that it computes, except for the seed."""

    config: Config
    name: str

    def folder(self, out: Path, seed: int) -> Path:
        """Returns the run folder of this pretraining with a seed."""
        return out / "runs" / f"{self.name}-seed{seed}"


@dataclass(frozen=True)
class Job:
    """A row of a table: its pretrainings in order, and the index of every data set on which it is evaluated."""

    table: PublishedTable
    row: PublishedRow
    chain: list[Step]
    indexes: dict[str, Path]
    scale: Scale

    @property
    def config(self) -> Config:
        """The config of the last pretraining, whose encoder is evaluated."""
        return self.chain[-1].config

    @property
    def recipe(self) -> RecipeName:
        """The name of the evaluation recipe that suits the clips of the pretraining."""
        return default_recipe(self.config.data)

    @property
    def hash(self) -> str:
        """A digest of everything that the results of the row depend on, except for the seed."""
        tasks = [dataclasses.asdict(getattr(self.config, task)) for task in TASKS]
        indexes = {name: _content(path) for name, path in self.indexes.items()}
        return digest(json.dumps([self.chain[-1].name, self.row.view, self.recipe, tasks, indexes]))[:12]

    def card(self, out: Path, seed: int | str) -> Path:
        """Returns the path of the file that stores the result of the row with a seed."""
        return out / "cards" / self.table.name / f"{self.row.id}-seed{seed}-{self.hash}.json"


def reproduce(
    table: str,
    index: Path,
    *,
    rows: Sequence[str] = (),
    seeds: Sequence[int] = (0,),
    scale: Scale | None = None,
    hmdb51: Path | None = None,
    k400: Path | None = None,
    out: Path = Path("runs/reproduce"),
    progress: bool = False,
) -> dict[str, Any]:
    """Trains and evaluates rows of a table. Before the first training, checks that nothing required is missing.

    Args:
        table: A name or number of `published.toml`.
        index: The index used as UCF101, for pretraining and for all evaluations except those on HMDB51.
        rows: Names of rows; by default all rows that can be computed from the given data sets.
        hmdb51, k400: Indexes used as these data sets; without one, the rows and columns that need it are left out.
        out: The runs are written to OUT/runs, a card per row and seed to OUT/cards, and the table to OUT/TABLE.md.
    Returns:
        `table`, `scale`, `rows` (id, method, seeds, and by column mean, standard error and published rate, fractions),
        `cards`, `markdown`.
    """
    scale = scale or Scale()
    names = [table] if not table.isdecimal() else [n for n, t in published_tables().items() if t.number == int(table)]
    data = {name: path for name, path in {"ucf101": index, "hmdb51": hmdb51, "k400": k400}.items() if path}
    if len(names) > 1:
        raise InputError(f"TABLE: {table} of the paper is {' and '.join(names)} here; expected one of them")
    chosen = published_table(names[0] if names else table)
    jobs = _jobs(chosen, data, rows, scale)
    for job in jobs:
        _check(job, data)
    for seed in seeds:
        for job in jobs:
            if not job.card(out, seed).exists():
                log.info("%s, row %s, seed %d: %s", chosen.name, job.row.id, seed, scale.text)
                _run(job, seed, data, out, progress)
    return _summary(chosen, jobs, scale, out)


def list_tables() -> str:
    """Returns a text of all tables, with the data that each needs and the recipe of each row."""
    lines = []
    for table in published_tables().values():
        lines.append(f"{table.name} (Table {table.number}): {table.title}; {', '.join(table.columns.values())}")
        for row in table.rows:
            config = load(CONFIGS / f"{row.config}.toml")
            views = {view for cycle in config.schedule.cycles for view in cycle.views(shared=config.model.shared)}
            needs = ["labels"] + ["flow"] * ("flow" in views) + [Path(config.data.index).parts[0]]
            epochs = sum(cycle.epochs for cycle in config.schedule.cycles[: row.cycle])
            lines.append(
                f"  {row.id:12} configs/{row.config}.toml  {counted(epochs, 'epoch')}; needs {', '.join(needs)}"
            )
    return "\n".join(lines)


def _jobs(table: PublishedTable, data: Mapping[str, Path], rows: Sequence[str], scale: Scale) -> list[Job]:
    known = [row.id for row in table.rows]
    if unknown := [row for row in rows if row not in known]:
        raise InputError(f"--rows: table {table.name!r} has {', '.join(known)}, got {', '.join(unknown)}")
    wanted = [n for n in table.columns if n in ("ucf101", "hmdb51")] or [table.data]
    indexes = {name: data[name] for name in wanted if name in data}
    if not indexes:
        raise InputError(f"--hmdb51: table {table.name!r} is evaluated on {' and '.join(wanted)}; expected its index")
    jobs = []
    for row in table.rows:
        source = Path(load(CONFIGS / f"{row.config}.toml").data.index).parts[0]
        if source in data and (not rows or row.id in rows):
            jobs.append(Job(table, row, _chain(row, scale, data[source]), indexes, scale))
        elif row.id in rows:
            raise InputError(f"--rows: {row.id!r} is pretrained on {source}; expected its index as --{source}")
    return jobs


def _chain(row: PublishedRow, scale: Scale, index: Path) -> list[Step]:
    """Returns the pretrainings of a row. If one starts from the previous one, its `model.init` is PREVIOUS."""
    recipe = load(CONFIGS / f"{row.config}.toml")
    config = scale.apply(recipe)
    chain: list[Step] = []
    for name in STARTS:
        start = load(CONFIGS / f"{name}.toml")
        if config.model.init.rgb == f"{start.run.out}/checkpoints/{LAST}":
            without = {s: {k: v for k, v in values.items() if (s, k) != ("model", "init")}
                       for s, values in scale.settings.items()}  # fmt: skip
            chain.append(_step(name, Scale(scale.epochs, without).apply(start), None, index))
    if row.cycle is None:
        return [*chain, _step(row.config, config, chain[-1] if chain else None, index)]
    for cycle in config.schedule.cycles[: row.cycle]:
        alone = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, cycles=(cycle,)))
        chain.append(_step(row.config, alone, chain[-1] if chain else None, index))
    return chain


def _step(name: str, config: Config, previous: Step | None, index: Path) -> Step:
    values = config.to_dict()
    for section in ("run", *TASKS):
        values.pop(section)
    for key in READING:
        values["data"].pop(key)
    if previous:
        values["model"]["init"] = previous.name
    computed = digest(json.dumps([values, _content(index)]))[:12]
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, index=str(index)))
    return Step(config, f"{name}-{computed}")


def _content(path: Path) -> str:
    try:
        return digest(path.read_bytes())
    except OSError as error:
        raise InputError(f"--index: {str(path)!r} cannot be read: {error.strerror}") from None


def _check(job: Job, data: Mapping[str, Path]) -> None:
    """Raises InputError if the row lacks something: flow, labels, splits, weights, or enough epochs to learn."""
    where = f"table {job.table.name!r}, row {job.row.id!r}"
    stored = job.chain[-1].config.data.flow == "stored"
    for number, step in enumerate(job.chain):
        config = step.config
        train = Index.load(config.data.index, require_flow=stored).select_for_training(config.data.split)
        train = train.long_enough(config.data)
        for cycle in config.schedule.cycles:
            if stored and "flow" in cycle.views(shared=config.model.shared):
                _check_flow(where, config.data.index, train)
            if (cycle.mining == "label" or "pmr" in job.table.columns) and (train.labels < 0).any():
                raise InputError(f"{where}: expected a label for every training video of {config.data.index}")
            steps = cycle.epochs * (len(train) // config.data.batch_size)
            memory = config.memory
            needed = memory.size // config.data.batch_size if memory.kind == "queue" else 0
            if memory.kind == "bank" and cycle.mining == "cascade":
                needed = len(train) // config.data.batch_size
            if steps <= needed:
                raise InputError(
                    f"{where}: a cycle of {step.name} has {counted(steps, 'step')}, and its memory is "
                    f"full after {needed}: it "
                    "would not learn as it should; expected a larger scale, or a smaller memory.size in the settings"
                )
        if number == 0:
            for path in filter(None, dataclasses.asdict(config.model.init).values()):
                if not Path(path).is_file():
                    raise InputError(
                        f"{where}: model.init {path!r} does not exist; cpr-fast import-checkpoint makes it"
                    )
    if set(job.table.columns) <= {"pmr", "cmr_median"}:
        return
    for path in job.indexes.values():
        split = load_split(path, job.chain[-1].config.data)
        if stored and job.row.view == "flow":
            _check_flow(where, path, [*split.train, *split.test])


def _check_flow(where: str, path: str | Path, videos: Sequence[Any]) -> None:
    if missing := sum(video.flow_path is None for video in videos):
        raise InputError(
            f"{where}: {missing} of {counted(len(videos), 'video')} of {path} have no flow; run `cpr-fast flow` first"
        )


def _run(job: Job, seed: int, data: Mapping[str, Path], out: Path, progress: bool) -> None:
    """Runs the chain and the evaluation of one row and seed, and writes its card."""
    checkpoint = None
    for step in job.chain:
        config = step.config
        run = dataclasses.replace(config.run, out=str(step.folder(out, seed)), seed=seed)
        model = config.model
        if checkpoint:
            both = {"rgb": checkpoint} | ({} if model.shared else {"flow": checkpoint})
            model = dataclasses.replace(model, init=dataclasses.replace(type(model.init)(), **both))
        config = dataclasses.replace(config, run=run, model=model)
        folder = pretrain(config, resume="auto", progress=progress)
        checkpoint = str(folder / "checkpoints" / LAST)
    metrics = _mining(folder, job.row.view, job.table.columns)
    for name, path in job.indexes.items():
        metrics |= _evaluate(job, f"{job.row.view}={checkpoint}", name, path, seed, progress)
    card = {
        "table": job.table.name, "number": job.table.number, "row": job.row.id, "method": job.row.method, "seed": seed,
        "metrics": metrics, "published": {key: value / 100 for key, value in job.row.values.items()},
        "scale": {"epochs": job.scale.epochs, "settings": job.scale.settings, "text": job.scale.text},
        "recipe": job.recipe, "view": job.row.view, "config": f"configs/{job.row.config}.toml", "hash": job.hash,
        "index": {name: str(path) for name, path in (dict(data) | job.indexes).items()}, "checkpoint": checkpoint,
        **environment(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    path = job.card(out, seed)
    write_result(path.parent, path.stem, card)


def _mining(folder: Path, view: str, columns: Mapping[str, str]) -> dict[str, float]:
    """Returns the mining rates of the last epoch of a run."""
    last = [row for row in read_metrics(folder) if row["kind"] == "epoch" and row["view"] == view][-1]
    return {key: last[key] for key in ("pmr", "cmr_median") if key in columns}


def _evaluate(job: Job, checkpoint: str, data: str, index: Path, seed: int, progress: bool) -> dict[str, float]:
    """Returns the columns that are measured on one data set with its train and test split, as fractions."""
    columns, config = job.table.columns, job.config
    common = {"recipe": job.recipe, "device": config.run.device, "progress": progress}
    found = {}
    if ranks := [key for key in columns if key.startswith("r@")]:
        rates = retrieve(checkpoint, index, **common)
        found = {key: rates[key] for key in ranks}
    for key in columns:
        task = "finetune" if key == data else key
        if task in TASKS and (key == data or key in job.row.values):
            crops = 1 if job.recipe == "iic" else TASKS[task]
            result = classify(
                checkpoint, [index], task=task, settings=getattr(config, task), crops=crops, seeds=(seed,), **common
            )
            found[key] = result["accuracy"]
    return found


def _summary(table: PublishedTable, jobs: Sequence[Job], scale: Scale, out: Path) -> dict[str, Any]:
    """Collects the cards of these rows over all seeds, and writes OUT/TABLE.md."""
    rows, cards = [], []
    heading = " | ".join(f"{name} (published)" for name in table.columns.values())
    text = [f"# Table {table.number}: {table.title}", "", f"Scale: {scale.text}. Published: {table.protocol}.",
            "Ours, mean ± standard error over seeds, percent.", "", f"| row | seeds | {heading} |",
            "|" + "---|" * (2 + len(table.columns))]  # fmt: skip
    for job in jobs:
        paths = sorted(job.card(out, 0).parent.glob(job.card(out, "*").name))
        found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        cards += map(str, paths)
        row: dict[str, Any] = {"row": job.row.id, "method": job.row.method, "seeds": [card["seed"] for card in found]}
        cells = []
        for key in table.columns:
            values = [v for card in found if (v := card["metrics"].get(key)) is not None]
            published = job.row.values.get(key)
            error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
            row[key] = {"mean": mean(values) if values else None, "standard_error": error,
                        "published": None if published is None else published / 100}  # fmt: skip
            ours = (
                f"{100 * mean(values):.1f}" + (f" ± {100 * error:.1f}" if error is not None else "") if values else "–"
            )
            cells.append(f"{ours} ({'–' if published is None else published})")
        rows.append(row)
        text.append(f"| {job.row.method} | {len(found)} | {' | '.join(cells)} |")
    path = out / f"{table.name}.md"
    with replacing(path) as temporary:
        temporary.write_text("\n".join(text) + "\n", encoding="utf-8")
    return {"table": table.name, "scale": scale.text, "rows": rows, "cards": cards, "markdown": str(path)}


def read_settings(path: Path) -> dict[str, Any]:
    """Reads sections of a config from a TOML file."""
    try:
        return tomllib.loads(decoded(path.read_bytes()))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"--settings: {str(path)!r} cannot be read as TOML: {error}") from None
