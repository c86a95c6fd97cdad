"""Small training runs in processes of their own, which tests signal and kill.

They are forked from a server that has loaded torch once: importing the training loop and building the first optimiser
takes a new process seven to nine seconds of CPU time.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import TextIO

from cpr_fast.config import Config

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["torch", "torch._dynamo", "cpr_fast.pretrain.run.loop"])


def _train(settings: dict, videos: int, errors: str) -> None:
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), sys.stderr.fileno())
    import torch
    from support.stand_in_loader import NoisyLoader, make_index

    from cpr_fast.pretrain.run.loop import pretrain
    from cpr_fast.runtime.interrupt import Interrupted

    class Loader(NoisyLoader):
        sleep_s = 0.05

    torch.set_num_threads(1)
    try:
        pretrain(
            Config.from_dict(settings), index=make_index(videos), make_loader=Loader, progress=False, resume="auto"
        )
    except Interrupted as stopped:
        sys.exit(str(stopped))


class TrainingProcess:
    """A run of `config` on random clips that is resumed if there is a checkpoint. Its stderr goes to a file."""

    def __init__(self, config: Config, errors: Path, videos: int = 18) -> None:
        self._errors = errors
        self._process = _server.Process(target=_train, args=(config.to_dict(), videos, str(errors)))
        self._process.start()

    def poll(self) -> int | None:
        """Returns the exit code, or None while the process runs."""
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self._process.pid, number)

    @property
    def stderr(self) -> TextIO:
        """What the process has written to stderr."""
        return self._errors.open() if self._errors.exists() else io.StringIO()

    def wait(self) -> str:
        """Waits for the end of the process and returns what it wrote to stderr."""
        self._process.join()
        return self.stderr.read()
