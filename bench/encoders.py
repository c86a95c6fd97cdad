"""Takes every shipped encoder through the commands of a user, on real clips.

    python bench/encoders.py [--networks r3d vit … | --table]

Needs the clips of UCF101 in $CPR_FAST_SHARED/data (default ../shared/data), and the packages torchvision and
transformers. Each network is trained on eight clips by a small recipe of three cycles, whose last one mines, and goes
through `pretrain`, `pretrain --resume`, `retrieve`, `probe`, `finetune`, `search` and `export`. Writes
bench/results/encoders.json and encoders.md.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import json
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import onnxruntime
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from measure import RESULTS, uncommitted, world, write_result
from page import markdown_table
from support import real_clips

import cpr_fast
from cpr_fast.cli import main as cpr_fast_main
from cpr_fast.data.clips.loader import TrainLoader
from cpr_fast.data.index.build import IndexOptions, write_index
from cpr_fast.data.index.index import Index
from cpr_fast.runtime.metrics import read_metrics
from cpr_fast.weights.checkpoint import load_checkpoint, load_encoders
from cpr_fast.wording import listed

CLASSES = ("BabyCrawling", "BalanceBeam", "Biking", "BlowDryHair")
RECIPE = """[data]
index = "{classes}.csv"
frames = {frames}
size = {size}
batch_size = {classes}
workers = 1
[model]
arch = "{arch}"
{model}
[memory]
size = {classes}
[mining]
stages = 3
top_k = 1
[schedule]
cycles = [
  {{ view = "rgb", epochs = 1, mining = "none" }},
  {{ view = "residual", epochs = 1, mining = "none" }},
  {{ view = "rgb", epochs = 2, mining = "cascade", other = "residual" }},
]
[run]
out = "runs/{name}"
device = "cpu"
keep_checkpoints = 8
"""
ABOUT = """Each network is trained from random weights on one clip of UCF101 of each of four classes, and tested on one
of each of other sources; torchvision's S3D and MViT, which take large clips only, of two classes. The recipe has three
cycles in which a batch holds all clips: RGB with InfoNCE (1 epoch), frame residuals with InfoNCE (1), and RGB with a
cascade of three stages over both (2 epochs, of which the first fills the queue). The networks of the package have a
quarter of their width, and those of transformers three layers of width 96, saved as a folder of safetensors. This shows
that every command works with every network. It does not show that anything is learnt: chance is 25 % or 50 %.

- *resumed = straight*: the run was continued from the checkpoint after three of four epochs, in the cycle that mines,
  by `pretrain --resume`; `cpr-fast diff` compared ledger and checkpoints of both runs bit for bit.
- *finetune*: with `--layer-decay 0.75`. *search*: the similarity of a clip of the index to itself, or 0 if another clip
  was found first. The S3Ds of the package have 0: after four steps the running statistics of their BatchNorm are near
  the initial values, and the cosine of the features of any two clips is above 0.9999.
- *Loss*: in the first epoch the negatives are the random vectors of the queue. *Equal* is bit for bit.
- *safetensors*: the tensors of the file and of the checkpoint. *hub*: features of the training clips by
  `cpr_fast.from_pretrained` of the exported folder and by the checkpoint; *own code*: by the folder's `modeling.py`,
  which needs torch alone. *ONNX*: the largest deviation of ONNX Runtime's features, relative to the largest feature.
- *CPU s*: all commands together, one thread.

"""
FIRST_EPOCHS = 3  # of four, after which the run is continued


@dataclass(frozen=True)
class Network:
    """An encoder: its name, the settings of a recipe, and what has to be written before."""

    name: str
    arch: str
    frames: int = 8
    size: int = 64
    model: str = ""  # further lines of [model]
    classes: int = len(CLASSES)  # of each of which one clip is trained on and one is tested
    folder: dict[str, Any] = field(default_factory=dict)  # the settings of a model of transformers, saved in a folder


def torchvision(name: str, frames: int = 8, size: int = 32, classes: int = len(CLASSES)) -> Network:
    return Network(f"torchvision {name}", f"torchvision.models.video:{name}", frames, size, classes=classes)


def transformers(name: str, **settings: Any) -> Network:
    about = {"hidden_size": 96, "num_attention_heads": 3, "num_hidden_layers": 3, "patch_size": 16, "tubelet_size": 2}
    folder = name.replace(" ", "_").lower()
    return Network(f"transformers {name}", "cpr_fast.models.huggingface:encoder",
                   model=f'args = {{ path = "{folder}" }}', folder=about | settings)  # fmt: skip


VIT = "args = { depth = 4, width = 96, heads = 3, tubelet = [2, 16, 16], drop_path = 0.1, class_token = true }"
NETWORKS = (
    *(Network(arch, arch, model="width = 0.25") for arch in ("s3d", "s3dg", "s3d_milnce", "r3d", "r21d", "c3d")),
    Network("vit", "vit", model=VIT),
    *map(torchvision, ("r3d_18", "mc3_18", "r2plus1d_18", "swin3d_t")),
    *(torchvision(name, 16, 224, classes=2) for name in ("s3d", "mvit_v2_s")),  # the smallest clips that they take
    transformers("VideoMAE", model_type="videomae", image_size=64, num_frames=8, intermediate_size=192),
    transformers("V-JEPA 2", model_type="vjepa2", crop_size=64, frames_per_clip=8, pred_hidden_size=24,
                 pred_num_attention_heads=2, pred_num_hidden_layers=1),
)  # fmt: skip


def answer(*words: str) -> dict[str, Any]:
    """Runs a command, which has to succeed, and returns the JSON object that it prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = cpr_fast_main([*words, "--json"])
    if code:
        raise RuntimeError(f"cpr-fast {' '.join(words)}: expected the exit code 0, got {code}")
    return json.loads(out.getvalue())


def write_videos(folder: Path) -> None:
    """Writes an index of two clips of each class: the first by name, which is trained on, and the last, of another
    source, which is tested; and one of the first two classes alone."""
    for name in CLASSES:
        shutil.copytree(real_clips.ROOT / "ucf101_100" / name, folder / "clips" / name)
    write_index(folder / "clips", folder / "all.csv", IndexOptions(layout="folders"), progress=False)
    found = sorted(Index.load(folder / "all.csv"), key=lambda video: video.path)
    pairs = [[video for video in found if video.label == name] for name in CLASSES]
    for classes in {network.classes for network in NETWORKS}:
        chosen = [
            dataclasses.replace(videos[place], split=split)
            for videos in pairs[:classes]
            for place, split in ((0, "train"), (-1, "test"))
        ]
        Index(chosen).save(folder / f"{classes}.csv")


def write_network(network: Network) -> None:
    """Writes the model of transformers with random weights as safetensors, if the network is one."""
    if network.folder:
        from transformers import AutoConfig, AutoModel

        torch.manual_seed(0)
        place = network.model.split('"')[1]
        AutoModel.from_config(AutoConfig.for_model(**network.folder)).save_pretrained(place)


def pretrained(name: str, network: Network) -> dict[str, Any]:
    """Trains a network, and again from a checkpoint in the middle on, and compares the two runs bit for bit."""
    recipe = Path(f"{name}.toml")
    recipe.write_text(RECIPE.format(**dataclasses.asdict(network) | {"name": name}))
    run, again = Path("runs", name), Path("runs", f"{name}_again")
    answer("pretrain", str(recipe))
    shutil.copytree(run, again)
    saved = sorted((again / "checkpoints").glob("step-*.pt"))
    for path in (*saved[FIRST_EPOCHS:], again / "checkpoints" / "last.pt"):
        path.unlink()
    answer("pretrain", str(recipe), "--run.out", str(again), "--resume")
    rows = read_metrics(run)
    learnt = [row for row in rows if row["kind"] == "epoch" and row["learning_steps"]]
    return {
        "steps": sum(row["kind"] == "step" for row in rows),
        "first_loss": learnt[0]["loss"],
        "last_loss": learnt[-1]["loss"],
        "pmr": learnt[-1]["pmr"],
        "weights_change": min(row["weights_change"] for row in learnt),
        "resumed_after": int(saved[FIRST_EPOCHS - 1].stem.split("-")[1]),
        "resumed_equal": answer("diff", str(run), str(again))["equal"],
    }


def evaluated(checkpoint: str, index: str, query: Path) -> dict[str, float]:
    """Returns the rates of RGB by `retrieve`, `probe` and `finetune`, and the similarity of a video of the index to
    itself by `search`."""
    data = ("--index", index, "--clips", "1")
    rates = {"retrieve": answer("retrieve", checkpoint, *data)["summary"][0]["r@1"]}
    for task, epochs, more in (("probe", "5", ()), ("finetune", "1", ("--layer-decay", "0.75"))):
        found = answer(task, checkpoint, *data, "--crops", "1", "--epochs", epochs, *more)
        rates[task] = found["summary"][0]["accuracy"]
    found = answer("search", str(query), "--index", index, "--checkpoint", checkpoint, "--clips", "1")
    best = found["queries"][0]["results"][0]
    return rates | {"search": best["similarity"] if Path(best["path"]).name == query.name else 0.0}


@torch.inference_mode()
def exported(checkpoint: str, name: str, clips: torch.Tensor) -> dict[str, Any]:
    """Exports in three forms, and compares each with the checkpoint: tensors of safetensors, features of a folder for a
    hub (by cpr_fast.from_pretrained and, of networks of the package, by the folder's own code) and of ONNX Runtime."""
    ours = load_encoders(checkpoint)[1]["rgb"].eval()
    features, row = ours.features(clips), {}
    answer("export", checkpoint, "--to", "safetensors", "--out", f"{name}.safetensors")
    tensors = load_file(f"{name}.safetensors")
    state = load_checkpoint(checkpoint)["encoders"]
    row["safetensors"] = all(
        torch.equal(tensors[f"{view}.{key}"], value) for view in state for key, value in state[view].items()
    )
    hub = answer("export", checkpoint, "--to", "hub", "--view", "rgb", "--out", f"{name}_hub")
    row["hub"] = torch.equal(cpr_fast.from_pretrained(f"{name}_hub").features(clips), features)
    if hub["standalone"]:
        code = module_of(Path(f"{name}_hub/modeling.py"))
        row["modeling"] = torch.equal(code.from_pretrained(f"{name}_hub").features(clips), features)
    answer("export", checkpoint, "--to", "onnx", "--view", "rgb", "--out", f"{name}.onnx")
    theirs, _ = onnxruntime.InferenceSession(f"{name}.onnx").run(None, {"clips": clips.numpy()})
    row["onnx_error"] = float((torch.from_numpy(theirs) - features).abs().max() / features.abs().max())
    return row


def module_of(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"modeling_of_{path.parent.name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measured(network: Network) -> dict[str, Any]:
    """Takes a network through all commands and returns its row."""
    name = network.name.replace(" ", "_").replace("-", "").lower()
    write_network(network)
    began = time.process_time()
    row = pretrained(name, network)
    checkpoint = f"runs/{name}/checkpoints/last.pt"
    config, encoders = load_encoders(checkpoint)
    index = Index.load(config.data.index)
    row |= evaluated(checkpoint, config.data.index, index[1].path)
    with contextlib.closing(TrainLoader(index.select(split="train"), config.data, ("rgb",), seed=0)) as loader:
        clips = next(iter(loader.epoch(0))).clips["rgb"][:, 0].float()
    row |= exported(checkpoint, name, clips)
    backbone = encoders["rgb"].backbone
    return {
        "network": network.name,
        "clip": f"{network.frames}x{network.size}x{network.size}",
        "parameters": sum(weight.numel() for weight in backbone.parameters()),
        "features": encoders["rgb"].width,
        **row,
        "cpu_s": time.process_time() - began,
    }


def page(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown page."""
    header = ["network (`model.arch`)", "clip", "weights, millions", "features", "loss, first and last epoch",
              "resumed = straight", "retrieve R@1", "probe", "finetune", "search, itself", "safetensors",
              "hub", "ONNX, error", "CPU s", "commit"]  # fmt: skip
    yes = {True: "equal", False: "DIFFERENT"}
    lines = []
    for row in rows:
        hub = yes[row["hub"]] + (f", own code {yes[row['modeling']]}" if "modeling" in row else "")
        lines.append(
            [row["network"], row["clip"], f"{row['parameters'] / 1e6:.2f}", str(row["features"]),
             f"{row['first_loss']:.2f}, {row['last_loss']:.2f}", yes[row["resumed_equal"]],
             *(f"{100 * row[task]:.0f}" for task in ("retrieve", "probe", "finetune")), f"{row['search']:.3f}",
             yes[row["safetensors"]], hub, f"{row['onnx_error']:.0e}", f"{row['cpu_s']:.0f}", row["commit"]]
        )  # fmt: skip
    title = "# Every shipped encoder through the commands, on real clips"
    command = "`python bench/encoders.py`, or with `--networks NAME …` for some of the rows."
    of = {
        key: listed(sorted({row[key] for row in rows if key in row}))
        for key in ("device", "torch", "torchvision", "transformers")
    }
    machine = (
        f"{of['device']}, torch {of['torch']}, torchvision {of['torchvision']}, transformers {of['transformers']}."
    )
    names = {row["network"] for row in rows}
    missing = [network.name for network in NETWORKS if network.name not in names]
    more = f"\nNot measured yet: {listed(missing)}.\n" if missing else ""
    more += f"\n{sentence}\n" if (sentence := uncommitted(rows)) else ""
    return f"{title}\n\n{command} {machine}\n\n{ABOUT}{markdown_table(header, lines)}{more}"


def without_compiled_operators() -> None:
    """Lets torchvision be imported where its compiled operators do not fit torch, as with the CPU build of torch; none
    of its video networks uses them."""
    sys.modules.setdefault("torchvision._meta_registrations", ModuleType("of operators that are not loaded"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=[n.name for n in NETWORKS], metavar="NAME",
                        help=f"of {', '.join(n.name for n in NETWORKS)}")  # fmt: skip
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only write the page of the stored rows again")
    args = parser.parse_args()
    if unknown := set(args.networks) - {network.name for network in NETWORKS}:
        parser.error(f"--networks: expected names of {', '.join(n.name for n in NETWORKS)}, got {sorted(unknown)}")
    without_compiled_operators()
    torch.set_num_threads(1)
    results = args.results.resolve()
    file = results / "encoders.json"
    rows = {row["network"]: row for row in json.loads(file.read_text())} if file.exists() else {}
    if args.table:
        write_result("encoders.md", page(list(rows.values())), results)
        return
    about = {key: value for key, value in world("cpu").items() if key != "command"}
    used = {name.partition(" ")[0] for name in args.networks} & {"torchvision", "transformers"}
    about |= {name: version(name) for name in sorted(used)}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        write_videos(Path())
        for network in NETWORKS:
            if network.name in args.networks:
                rows[network.name] = measured(network) | about
                print(rows[network.name], flush=True)
                known = [rows[network.name] for network in NETWORKS if network.name in rows]
                write_result(file.name, json.dumps(known, indent=1) + "\n", results)
                write_result("encoders.md", page(known), results)


if __name__ == "__main__":
    main()
