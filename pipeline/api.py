"""`pipeline.train`, `pipeline.train_together` and `pipeline.tune`: a run, several, and a sweep, each with its report page."""

from __future__ import annotations

import shlex
import threading
from collections.abc import Sequence
from typing import Any

from pipeline import report as pages
from pipeline.config import RunConfig
from pipeline.doctor.examination import check_before_run
from pipeline.errors import UserError
from pipeline.io.retry import STORAGE_ERRORS
from pipeline.io.storage import Location, inside, reason
from pipeline.runs.folder import REPORT, RunFolder
from pipeline.runs.result import TrainResult
from pipeline.tracking.dispatcher import check_trackers
from pipeline.training.driver import RunHooks, train_run
from pipeline.training.together.driver import run_together
from pipeline.tuning.folder import SweepFolder
from pipeline.tuning.shared_stages import SharedStages
from pipeline.tuning.sweep import SweepResult, run_sweep
from pipeline.ui.display import Display

__all__ = ["train", "train_together", "tune"]


def train(
    cfg: RunConfig,
    *,
    resume: bool = False,
    display: Display | None = None,
    debug: bool = False,
    cancel: threading.Event | None = None,
    report: bool = True,
) -> TrainResult:
    """Prepare the data, score a cached reference, and train on Ray; the run's files go to `output_dir`.

    Args:
        cfg: the recipe.
        resume: continue the run in `output_dir`; without it, an existing run is refused.
        display: shows stages, steps and notes; when None, progress is shown in a notebook and nothing elsewhere.
        debug: show the workers' output.
        cancel: set by another thread to cancel the run; its complete checkpoints stay.
        report: write the run's page when it ends, even if it failed.

    Raises:
        UserError: for anything that the user can fix, before workers start where possible.
        RunFailed: when workers failed more often than `ray.max_failures`.
        RunCancelled: after `cancel.set()`.
    """
    return train_run(cfg, resume=resume, display=display, debug=debug, cancel=cancel, hooks=_run_hooks(report))


def train_together(
    recipes: Sequence[RunConfig],
    names: Sequence[str] | None = None,
    *,
    resume: bool = False,
    display: Display | None = None,
    debug: bool = False,
    cancel: threading.Event | None = None,
    report: bool = True,
) -> list[TrainResult]:
    """Train several recipes, each as `train` does; those of adapters that can share one base do.

    Runs that can't share have workers of their own. As many train at once as the cluster has room for. One that fails ends no
    other.

    Args:
        recipes: each with an `output_dir` of its own.
        names: of the runs, in messages and in the table; those of their folders when None.
        resume: continue the runs; finished ones stay as they are. Without it, existing runs are refused.
        display: shows stages, the table of the runs, and notes; when None, progress is shown in a notebook and nothing
            elsewhere.
        debug: show the workers' output.
        cancel: set by another thread to cancel all runs; their complete checkpoints stay.
        report: write each run's page when it ends, even if it failed.

    Returns:
        The runs' results, in the order of the recipes.

    Raises:
        UserError: for recipes that can't be trained, or not together, before anything starts where possible.
        RunFailed: when runs have failed, once all have ended; it says which, and `load_run` loads the others.
        RunCancelled: after `cancel.set()`.
    """
    return run_together(recipes, names, resume=resume, display=display, debug=debug, cancel=cancel, hooks=_run_hooks(report))


def tune(cfg: RunConfig, *, resume: bool = False, display: Display | None = None, debug: bool = False) -> SweepResult:
    """Run the sweep that the recipe's `tune:` section describes; its files go to `output_dir`.

    Args:
        cfg: the recipe.
        resume: continue the sweep in `output_dir`: finished trials stay, others resume from their checkpoints.
        display: shows stages, trials and notes; when None, progress is shown in a notebook and nothing elsewhere.
        debug: show the output of workers and of Tune.

    Raises:
        UserError: for anything that the user can fix, before trials start where possible.
        RunFailed: when every trial has failed, or none is within the constraints.
    """
    return run_sweep(cfg, _sweep_page, resume=resume, display=display, debug=debug)


def _run_hooks(report: bool) -> RunHooks:
    """Return what a run adds that is on floors above `pipeline.training`: pages, trackers, the doctor."""
    page: dict[str, Any] = {"write_page": _write_run_page} if report else {}
    return RunHooks(check_recipe=check_trackers, check_cluster=check_before_run, **page)


def _write_run_page(folder: RunFolder, display: Display) -> Location | None:
    """Write the run's page; on errors, note them and return None: they don't fail the run."""
    display.stage("writing the report")
    page = inside(folder.path, REPORT)
    try:
        folder.storage.write(REPORT, pages.run_page(folder))
    except (UserError, *STORAGE_ERRORS) as error:
        display.note(f"{page} is not written: {reason(error)}; `prefray report {shlex.quote(str(folder.path))}` writes it")
        return None
    return page


def _sweep_page(result: SweepResult, folder: SweepFolder, shared: SharedStages) -> str:
    return pages.sweep_page(result, folder, shared)
