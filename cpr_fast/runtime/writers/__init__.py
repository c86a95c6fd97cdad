"""The writers of a run's numbers for other programs: TensorBoard, Weights & Biases and trackio.

Every writer has the three methods of `Writer`, and is used by `cpr_fast.runtime.metrics.MetricsWriter`, which writes
`metrics.jsonl` in every run. None of the packages is a dependency.

Imports `config` and `runtime`; all packages above it may import it.
"""

from cpr_fast.runtime.writers.opening import WRITERS, open_writers, require_packages, writers_of_run
from cpr_fast.runtime.writers.writer import Writer, send

__all__ = ["WRITERS", "Writer", "open_writers", "require_packages", "send", "writers_of_run"]
