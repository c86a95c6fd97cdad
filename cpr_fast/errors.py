"""Errors that a user can correct: bad input, and packages that are not installed."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """What a user passed (file, setting, argument) is wrong; the message names it, what came and what was expected.

    The command line prints it as one line and exits with 2; every other exception is a failure and exits with 1.
    """


# The modules that the extra [train] installs, with the package that each belongs to.
TRAIN_MODULES = {
    "numpy": "numpy",
    "nvidia.dali": "nvidia-dali-cuda130",
    "av": "av",
    "tyro": "tyro",
    "rich": "rich",
    "matplotlib": "matplotlib",
    "jinja2": "jinja2",
    "PIL": "pillow",
    "lmdb": "lmdb",
    "msgpack": "msgpack",
    "simplejpeg": "simplejpeg",
    "safetensors": "safetensors",
    "sklearn": "scikit-learn",
    "scipy": "scipy",
    "cv2": "opencv-contrib-python-headless",
}


def how_to_install(error: ImportError) -> str | None:
    """Returns the line that tells how to install what could not be imported, or None if that is not known.

    `pip install cpr-fast` installs only the operators, so the first command of a user may lack the other packages.
    """
    if error.name == "cpr_fast._host" or (error.name == "cpr_fast" and "_host" in str(error)):
        return "the compiled modules are not built: run `python setup.py build_ext` or `pip install .` in the checkout"
    if error.name == "cpr_fast._C":
        return str(error)
    known = {"torch", "nvidia"} | {module.partition(".")[0] for module in TRAIN_MODULES}
    if not isinstance(error, ModuleNotFoundError) or (error.name or "").partition(".")[0] not in known:
        return None
    wanted = {"torch": "torch"} | TRAIN_MODULES
    missing = [package for module, package in wanted.items() if not is_installed(module)]
    if not missing:  # a package is there, but a module inside it is not
        return None
    packages = "a package that is" if len(missing) == 1 else "packages that are"
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return (
        f"this command needs {packages} not installed ({', '.join(missing[:3])}{more}): "
        'run `pip install "cpr-fast[train]"`, or `pip install ".[train]"` in a checkout'
    )


def out_of_memory(error: BaseException) -> str | None:
    """Returns the line that reports an allocation that failed on a GPU or on the CPU, or None for any other error."""
    text = next((line for line in str(error).splitlines() if line.strip()), "")
    signs = ("out of memory", "can't allocate memory", "bad_alloc")
    if not isinstance(error, MemoryError) and not any(sign in text for sign in signs):
        return None
    return (
        f"not enough memory: {text or 'an allocation failed'}. Smaller values of data.batch_size, data.frames, "
        "data.size or memory.size need less, as does model.recompute = true"
    )


def is_installed(module: str) -> bool:
    """Returns whether a module can be found; it is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # the package that should hold the module is missing, or the module is blocked
        return False


@contextmanager
def enough_values(option: str) -> Iterator[None]:
    """Converts BatchNorm's error about a single value per channel to one that names the option of the batch size.

    It occurs where a process computes one clip at a time and the last layers have reduced it to one position.
    """
    try:
        yield
    except ValueError as error:
        if "Expected more than 1 value per channel" not in str(error):
            raise
        raise InputError(
            f"{option}: BatchNorm has nothing to average over one clip that the network reduces to one position; "
            f"expected 2 clips or more per process and part of a batch (optim.accumulate), or a larger data.size"
        ) from error


class FailedError(RuntimeError):
    """A command failed although its input was good, for a reason that the message explains in full.

    The command line prints it as one line, without a traceback, and exits with 1.
    """
