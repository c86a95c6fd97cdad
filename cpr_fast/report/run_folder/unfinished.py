"""Whether a run has reached its last epoch, and if it has not, whether it is still running or how it is continued."""

from __future__ import annotations

from cpr_fast.config.recipes import resume_command
from cpr_fast.report.run_folder.run import Run
from cpr_fast.runtime.files import RUN_LOCK, is_locked
from cpr_fast.wording import counted


def unfinished(run: Run) -> str | None:
    """Returns a sentence with the number of epochs that were reached and planned, and the command that continues the
    run; None if it is finished, or if its rows do not tell how many epochs were planned."""
    planned = run.planned_epochs
    if planned is None or len(run.epochs) >= planned:
        return None
    reached = f"{len(run.epochs)} of {counted(planned, 'epoch')} {'is' if len(run.epochs) == 1 else 'are'} finished"
    if is_locked(run.folder / RUN_LOCK):
        return (
            f"This run is still training: {reached}, and all results here are preliminary. Once it has ended, evaluate "
            "it again and write this report again."
        )
    saved = (run.folder / "checkpoints" / "last.pt").exists()
    command = resume_command(run.folder, option="--resume" if saved else "--auto-resume")
    return (
        f"This run is unfinished: {reached}, and all results here are those of a training that was stopped. To "
        f"continue it: {command}"
    )
