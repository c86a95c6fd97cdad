"""Networks that are not part of the package: finds the factory that `model.arch` names, calls it with `model.args`, and
checks what it returns.

A factory is a class or a function that returns an nn.Module, in an importable module ("package.module:factory") or in a
Python file ("path/to/file.py:factory"). The working directory, and the folder of the file, can be imported from.

A checkpoint names its factory too, and a file from others could name any function of the Python installation, such as
`os:system`. Of an installed package, only classes of nn.Module and functions that are annotated to return one are
therefore called.
"""

from __future__ import annotations

import copy
import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import site
import sys
import sysconfig
import traceback
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cpr_fast.config import DataConfig, ModelConfig
from cpr_fast.errors import InputError, out_of_memory

CLIP = ("clip_frames", "clip_size")  # arguments of a factory, and attributes that a network may declare
_HEADS = ("fc", "head", "classifier")  # the attribute of torchvision's networks that maps features to classes


def make_network(model: ModelConfig, data: DataConfig) -> tuple[nn.Module, Callable[..., nn.Module]]:
    """Returns a new network, initialised from torch's global random generator, and its factory.

    A factory with the arguments `clip_frames` or `clip_size` gets those of `data`, unless `model.args` holds them. The
    last layer of a network of torchvision, which maps features to classes, is replaced by the identity.

    Raises:
        InputError: the factory cannot be imported, refuses `model.args`, or returns anything else than a network of
            float32 on the CPU.
    """
    where = f"model.arch {model.arch!r}"
    with _importable(model):
        factory = load_factory(model)
        args = _arguments(factory, model, data)
        try:
            network = factory(**args)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        except (Exception, SystemExit) as error:  # of the user's code
            if out_of_memory(error):
                raise
            raise InputError(f"{where}: the factory raised {described(error)}; model.args is {model.args}") from error
    if not isinstance(network, nn.Module):
        raise InputError(f"{where}: expected the factory to return an nn.Module, got {type(network).__name__}")
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if isinstance(tensor, nn.parameter.UninitializedTensorMixin):
            continue  # of a lazy module, until its first forward pass
        wrong = tensor.is_floating_point() and tensor.dtype != torch.float32
        if wrong or tensor.device.type != "cpu":
            raise InputError(
                f"{where}: expected tensors of float32 on the CPU, which optim.precision and run.device change later, "
                f"got {name} of {tensor.dtype} on {tensor.device}"
            )
    if type(network).__module__.startswith("torchvision."):
        for head in _HEADS:
            if isinstance(getattr(network, head, None), nn.Module):
                setattr(network, head, nn.Identity())
    return network, factory


def load_factory(model: ModelConfig) -> Callable[..., nn.Module]:
    """Imports the factory of a config. Raises InputError that names what is missing and what to do."""
    where = f"model.arch {model.arch!r}"
    place, name = model.factory
    module = _import_file(place, where) if place.endswith(".py") else _import_module(place, where)
    factory = getattr(module, name, None)
    if factory is None:
        close = difflib.get_close_matches(name, dir(module), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise InputError(f"{where}: expected a class or function {name!r} in {place!r}, which has none{hint}")
    if not callable(factory):
        raise InputError(f"{where}: expected {name!r} to be a class or function, got {type(factory).__name__}")
    if not _returns_network(factory) and _is_installed(factory):
        raise InputError(
            f"{where}: expected a class of nn.Module or a function that is annotated to return one (`-> nn.Module`), "
            f"as every factory in an installed package has to be, got {_kind(factory)}; a function in a file of your "
            "own may call it"
        )
    return factory


def source_digest(factory: Callable[..., nn.Module]) -> str:
    """Returns a digest of the file that defines a factory, or "" if there is none."""
    try:
        return hashlib.sha256(Path(inspect.getsourcefile(_definition(factory))).read_bytes()).hexdigest()
    except (TypeError, OSError):
        return ""


@contextmanager
def _importable(model: ModelConfig) -> Iterator[None]:
    """Within the block, modules can be imported from the file's folder first, and from the working directory last."""
    place = model.factory[0]
    path = [str(Path(place).absolute().parent), *sys.path] if place.endswith(".py") else [*sys.path, os.getcwd()]
    before, sys.path = sys.path, path
    try:
        yield
    finally:
        sys.path = before


def _import_file(place: str, where: str) -> types.ModuleType:
    path = Path(place)
    if not path.is_file():  # a checkpoint that was moved to another machine
        path = Path(path.name)
    if not path.is_file():
        raise InputError(
            f"{where}: expected the Python file {place!r}, which does not exist; run the command in a folder that "
            f"holds {path.name}, or put the file there"
        )
    source = path.read_bytes()
    # A module of its own for every content, which is executed once.
    name = f"{path.stem}_{hashlib.sha256(source + str(path.absolute()).encode()).hexdigest()[:12]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except (Exception, SystemExit) as error:  # of the user's code
            del sys.modules[name]
            raise InputError(f"{where}: importing {str(path)!r} raised {described(error)}") from error
    return sys.modules[name]


def _import_module(place: str, where: str) -> types.ModuleType:
    importlib.invalidate_caches()  # the file may be new
    try:
        return importlib.import_module(place)
    except (Exception, SystemExit) as error:  # of the user's code
        if isinstance(error, ModuleNotFoundError) and error.name and f"{place}.".startswith(f"{error.name}."):
            raise InputError(
                f"{where}: there is no module {error.name!r}; install it, run the command in the folder that holds it, "
                "or add that folder to the environment variable PYTHONPATH"
            ) from None
        raise InputError(f"{where}: importing {place!r} raised {described(error)}") from error


def _arguments(factory: Callable[..., nn.Module], model: ModelConfig, data: DataConfig) -> dict[str, Any]:
    """Returns the arguments of a factory. Raises InputError that names the argument if it does not take them."""
    args = copy.deepcopy(model.args)
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # of a class or function in C
        return args
    kinds, parameters = inspect.Parameter, signature.parameters
    named = [k for k, p in parameters.items() if p.kind in (kinds.KEYWORD_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
    args |= {k: getattr(data, k.removeprefix("clip_")) for k in CLIP if k in named and k not in args}
    where, known = f"of model.arch {model.arch!r}", ", ".join(named) or "none"
    if not any(p.kind == kinds.VAR_KEYWORD for p in parameters.values()):
        for key in args:
            if key not in named:
                close = difflib.get_close_matches(key, named, n=1)
                hint = f"did you mean {close[0]!r}? " if close else ""
                raise InputError(f"model.args.{key}: no argument {where}; {hint}its arguments: {known}")
    for key in named:
        if parameters[key].default is kinds.empty and key not in args:
            raise InputError(f"model.args.{key}: expected a value, which the factory {where} requires, got none")
    return args


def _definition(factory: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Returns the class or function behind a factory that is a partial or decorated one."""
    while isinstance(factory, functools.partial):
        factory = factory.func
    return inspect.unwrap(factory)


def _returns_network(factory: Callable[..., nn.Module]) -> bool:
    """Returns whether a factory is a class of networks, or a function that is annotated to return one."""
    kind = factory = _definition(factory)
    if not isinstance(factory, type):
        try:
            kind = typing.get_type_hints(factory).get("return")
        except Exception:  # an annotation that cannot be evaluated, or an object without any
            return False
    return isinstance(kind, type) and issubclass(kind, nn.Module)


def _is_installed(factory: Callable[..., nn.Module]) -> bool:
    """Returns whether a factory belongs to Python or to an installed package, or is not written in Python."""
    try:
        file = os.path.realpath(inspect.getsourcefile(_definition(factory)))
    except TypeError:
        return True
    paths = sysconfig.get_paths()
    folders = {paths[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")} | {site.getusersitepackages()}
    return any(file.startswith(os.path.realpath(folder) + os.sep) for folder in folders)


def _kind(factory: Callable[..., nn.Module]) -> str:
    factory = _definition(factory)
    return f"the class {factory.__name__}" if isinstance(factory, type) else "a function without this annotation"


def described(error: BaseException) -> str:
    """Returns an error of the user's code on one line, with the place where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}{f': {text}' if text else ''}{place}"
