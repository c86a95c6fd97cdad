"""Video models of Hugging Face `transformers`, such as VideoMAE and V-JEPA 2, as backbones. Nothing is downloaded.

`model.arch = "cpr_fast.models.huggingface:encoder"`; the package transformers must be installed.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cpr_fast.errors import InputError, is_installed
from cpr_fast.wording import expected

_PREPROCESSORS = ("preprocessor_config.json", "video_preprocessor_config.json")  # hold the mean and std of the pixels
# Settings of config.json that say how the weights were saved, or name classes, and do not decide the network.
_NOT_OF_THE_NETWORK = (
    "architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "id2label", "label2id",
)  # fmt: skip


class HuggingFaceEncoder(nn.Module):
    """Maps clips [N, 3, T, H, W] to the tokens [N, L, D] of the last layer of a model of transformers.

    It declares the size of the clips and, where the model has a position for every token, the number of frames.

    Args:
        model: takes [N, T, 3, H, W] as its main input, and returns an object with `last_hidden_state`.
        preprocessor: the settings `image_mean` and `image_std`, if they are known.
    """

    def __init__(self, model: nn.Module, preprocessor: dict[str, Any]) -> None:
        super().__init__()
        config = model.config
        self.clip_size = getattr(config, "image_size", getattr(config, "crop_size", None))
        self.clip_frames = getattr(config, "num_frames", None)
        self.clip_mean, self.clip_std = preprocessor.get("image_mean"), preprocessor.get("image_std")
        self.input = model.main_input_name
        # V-JEPA 2 also has a predictor of masked tokens, which features do not need.
        self.model = model.encoder if hasattr(model, "predictor") else model

    def forward(self, clips: Tensor) -> Tensor:
        return self.model(**{self.input: clips.transpose(1, 2)}).last_hidden_state


def encoder(path: str | None = None, config: dict[str, Any] | None = None) -> nn.Module:
    """Returns a video model of transformers.

    Args:
        path: a folder with config.json and weights in safetensors, as `save_pretrained` writes it.
        config: instead of a folder, the settings of a model with random weights, with `model_type` ("videomae",
            "vjepa2", ...) among them.
    Raises:
        InputError: transformers is not installed, or the folder or the settings are not those of such a model.
    """
    _require_transformers()
    if (path is None) == (config is None):
        raise InputError("model.args: expected either path or config, got both" if path else
                         "model.args: expected either path or config, got neither")  # fmt: skip
    from transformers import AutoConfig, AutoModel

    if path is None:
        if "model_type" not in config:
            raise InputError("model.args.config: expected model_type, such as 'videomae', among the settings, got none")
        try:
            settings = AutoConfig.for_model(**config)
        except ValueError as error:
            raise InputError(f"model.args.config: {error}") from error
        return HuggingFaceEncoder(AutoModel.from_config(settings), {})
    folder = _model_folder(path)
    model, loaded = AutoModel.from_pretrained(
        str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    if missing := sorted(loaded["missing_keys"]):
        raise InputError(
            f"model.args.path: expected all weights of {type(model).__name__} in {path!r}, but {len(missing)} are "
            f"missing: {', '.join(missing[:3])}"
        )
    return HuggingFaceEncoder(model.float(), _preprocessor(folder))


def settings(path: str) -> tuple[dict[str, Any], tuple[float, ...], tuple[float, ...]]:
    """Returns what `encoder(config=...)` needs to build the network of a folder without its weights, and the mean and
    standard deviation of its pixels, which are empty if the folder does not state them.

    Raises:
        InputError: transformers is not installed, the folder is not there, or its settings do not say all.
    """
    _require_transformers()
    from transformers import AutoConfig

    folder = _model_folder(path)
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
        found = _of_the_network(config.to_diff_dict())
        rebuilt = AutoConfig.for_model(**copy.deepcopy(found))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"model.args.path: {str(folder / 'config.json')!r}: {error}") from error
    wanted, got = _of_the_network(config.to_dict()), _of_the_network(rebuilt.to_dict())
    if lost := [key for key in wanted if wanted[key] != got.get(key)]:
        raise InputError(
            f"model.args.path: expected settings that model.args.config can hold in {str(folder / 'config.json')!r}, "
            f"got others: {', '.join(lost)}"
        )
    preprocessor = _preprocessor(folder)
    return found, *(tuple(preprocessor.get(key) or ()) for key in ("image_mean", "image_std"))


def _require_transformers() -> None:
    if not is_installed("transformers"):
        raise InputError("the package transformers is not installed: pip install transformers")


def _of_the_network(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in _NOT_OF_THE_NETWORK}


def _model_folder(path: str) -> Path:
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise InputError(f"model.args.path: {expected('a folder with the config.json of a model', folder)}")
    return folder


def _preprocessor(folder: Path) -> dict[str, Any]:
    """Returns the settings of the preprocessing of pixels; {} if the folder has none."""
    files = (folder / name for name in _PREPROCESSORS)
    return next((json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()), {})
