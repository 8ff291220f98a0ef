"""Several runs as a whole: check all recipes, prepare all runs, train them, and return their results."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack

from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.io.storage import locate
from pipeline.ray.session import init_ray, set_intervals
from pipeline.runs.folder import RunFolder
from pipeline.runs.result import TrainResult
from pipeline.training.driver import NO_HOOKS, RunHooks, check_run
from pipeline.training.together.display import RunDisplay, TogetherDisplay
from pipeline.training.together.rules import find_problems, names_of
from pipeline.training.together.run import OneRun
from pipeline.training.together.schedule import Schedule
from pipeline.ui.display import Display
from pipeline.ui.notebook import default_display

__all__ = ["run_together"]


def run_together(
    recipes: Sequence[RunConfig],
    names: Sequence[str] | None = None,
    *,
    resume: bool = False,
    display: Display | None = None,
    debug: bool = False,
    cancel: threading.Event | None = None,
    hooks: RunHooks = NO_HOOKS,
) -> list[TrainResult]:
    """Train several recipes: the implementation of `pipeline.train_together`.

    Args:
        recipes, names, resume, display, debug, cancel: as there.
        hooks: what the caller adds to each run, but `launch`.

    Raises:
        UserError, RunsFailed, RunStopped, RunCancelled: as there.
    """
    names = names_of(recipes) if names is None else names
    if len(names) != len(recipes) or len(set(names)) < len(names):
        raise UserError(f"names: each of the {len(recipes)} recipes needs one of its own, got {', '.join(names) or 'none'}")
    shared = TogetherDisplay(display or default_display(), names)
    recipes = _checked(recipes, shared.runs, hooks, resume)
    shared.display.stage("starting Ray")
    for recipe in recipes:
        init_ray(recipe, debug)
        # Also for those that have come to a Ray that runs.
        set_intervals(recipe)
    runs = [OneRun(recipe, display) for recipe, display in zip(recipes, shared.runs, strict=True)]
    schedule = Schedule(runs, shared, debug)
    with ExitStack() as at_the_end:
        for run in runs:
            # Where this is left early, as by Ctrl-C, it ends the runs that haven't ended.
            at_the_end.push(run.context)
            run.open(resume=resume, debug=debug, cancel=schedule.cancel, hooks=hooks)
        schedule.train(cancel or threading.Event())
    return [run.result for run in runs if run.result is not None]


def _checked(recipes: Sequence[RunConfig], displays: list[RunDisplay], hooks: RunHooks, resume: bool) -> list[RunConfig]:
    """Return the recipes as their runs take them.

    Raises:
        UserError: naming all that is wrong with them, each by itself or beside the others.
    """
    if not recipes:
        raise UserError("recipes: there are none to train; give one or more")
    checked, problems = [], []
    for recipe, display in zip(recipes, displays, strict=True):
        try:
            checked.append(check_run(recipe, hooks, display))
            RunFolder(locate(checked[-1].output_dir)).check_free(checked[-1], resume)
        # Not only UserError: `strategies` raises ValueError for users.
        except ValueError as error:
            problems.append(f"{display.name}: {error}")
    if not problems:
        problems = list(find_problems([display.name for display in displays], checked))
    if problems:
        raise UserError("\n".join(problems))
    return checked
