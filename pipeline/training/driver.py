"""A run as a whole: prepare, score, train with Ray Train, and return the result."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import date
from typing import TYPE_CHECKING, Any

from cluster.sharding import sharding_of
from pipeline.config import RunConfig
from pipeline.config.paths import absolute_paths
from pipeline.data import prepare
from pipeline.data.store import check_root
from pipeline.errors import UserError
from pipeline.findings.run import write_findings
from pipeline.inspection.selection import Selection, select_rows, selected_count
from pipeline.io.cache import NodeCache
from pipeline.io.retry import STORAGE_ERRORS
from pipeline.io.storage import Location, locate, reason
from pipeline.planning import RunPlan, check_cache, check_recipe, resolve
from pipeline.ray.session import init_ray, node_resources
from pipeline.reference import (
    base_fingerprint,
    check_embeddings,
    check_pictures,
    check_positions,
    check_training_budget,
    pin_base,
    score,
)
from pipeline.runs.checkpoints import clean
from pipeline.runs.events import RunEvents
from pipeline.runs.folder import FINDINGS, RunFolder
from pipeline.runs.owner import owned
from pipeline.runs.result import TrainResult, result_of
from pipeline.tracking.dispatcher import Tracking
from pipeline.tracking.tracker import TrialInfo
from pipeline.training.launch import run_training
from pipeline.training.plan import TrainingPlan
from pipeline.ui.display import Display
from pipeline.ui.notebook import default_display
from strategies.config.rules import beyond
from strategies.config.schedule import RunLength, schedule_arguments

if TYPE_CHECKING:
    from pipeline.data import Prepared
    from pipeline.reference import Scores

__all__ = ["OpenRun", "RunHooks", "check_run", "open_run", "prepare_data", "score_reference", "train_run"]


CPU_BF16 = "bf16: this CPU multiplies bfloat16, so products are computed in it; bf16: false computes in float32"


@dataclass(frozen=True)
class RunHooks:
    """What a run's caller adds to it. A sweep has checked its trials, and shows them on a page of its own."""

    check_recipe: Callable[[RunConfig], None] = lambda cfg: None
    """Called before Ray starts; raises UserError."""
    check_cluster: Callable[[RunConfig], Iterable[str]] = lambda cfg: ()
    """Called when Ray has started; returns notes, raises UserError."""
    launch: Callable[[TrainingPlan, Display], dict[str, Any]] = run_training
    """Trains with workers, and returns rank 0's result."""
    write_page: Callable[[RunFolder, Display], Location | None] = lambda folder, display: None
    """Called when the run ends, even if it failed, while this process owns its folder; returns the page's path."""


NO_HOOKS = RunHooks()


def train_run(
    cfg: RunConfig,
    *,
    resume: bool = False,
    display: Display | None = None,
    debug: bool = False,
    cancel: threading.Event | None = None,
    trial: TrialInfo | None = None,
    hooks: RunHooks = NO_HOOKS,
) -> TrainResult:
    """Prepare, score and train: the implementation of `pipeline.train`, and of a sweep's trials.

    Args:
        cfg, resume, display, debug, cancel: as in `pipeline.train`.
        trial: what the run is in its sweep, for trackers.
        hooks: what the caller adds.

    Raises:
        UserError: for anything that the user can fix, before workers start where possible.
        RunFailed: when workers failed more often than `ray.max_failures`.
        RunCancelled: after `cancel.set()`.
    """
    display = display or default_display()
    cfg = check_run(cfg, hooks, display)
    display.stage("starting Ray")
    init_ray(cfg, debug)
    with open_run(cfg, resume=resume, display=display, debug=debug, cancel=cancel, trial=trial, hooks=hooks) as run:
        if run.plan is not None:
            run.returned = hooks.launch(run.plan, display)
    assert run.result is not None
    return run.result


def check_run(cfg: RunConfig, hooks: RunHooks, display: Display) -> RunConfig:
    """Check what can be checked before Ray starts; return the recipe as its run takes it, its paths absolute.

    Raises:
        UserError: naming the key.
    """
    # Workers have other current directories: Ray changes into a folder of its session.
    cfg = absolute_paths(cfg)
    check_recipe(cfg)
    hooks.check_recipe(cfg)
    if cfg.tune is not None:
        cfg = cfg.model_copy(update={"tune": None})
        display.note("tune: is for `prefray tune`; this run has the recipe's own values")
    folder = RunFolder(locate(cfg.output_dir))
    _show_notes(cfg.notes, display)
    folder.check_reached()
    check_root(cfg.dataset_prepared_path)
    NodeCache.of(cfg.ray).check_path()
    return cfg


@dataclass
class OpenRun:
    """A run from the end of its preparation to its own end; who has opened it trains it in between."""

    plan: TrainingPlan | None = None
    """What its workers need; None for a run that had finished before."""
    returned: dict[str, Any] = field(default_factory=dict)
    """Rank 0's result, to be set when it has trained."""
    result: TrainResult | None = None
    """Set when the run has ended."""


@contextmanager
def open_run(
    cfg: RunConfig,
    *,
    resume: bool,
    display: Display,
    debug: bool,
    cancel: threading.Event | None,
    trial: TrialInfo | None = None,
    hooks: RunHooks = NO_HOOKS,
) -> Iterator[OpenRun]:
    """Prepare and score; when the context is left, record how the run has ended, and write its page.

    Args:
        cfg: what `check_run` has returned; Ray has started.
        resume, display, debug, cancel, trial, hooks: as in `train_run`.

    Raises:
        UserError, RunFailed: as `train_run`.
    """
    folder = RunFolder(locate(cfg.output_dir))
    plan = resolve(cfg, node_resources())
    # Before `folder.open`, which may delete the metrics: they show what the trackers have received.
    tracking = Tracking(plan.recipe, folder.storage, resume, trial)
    with owned(folder.storage) as owner:
        if resume:
            # The day that templates print is part of the prepared data's fingerprint: with today's the data would have changed.
            plan = replace(plan, recipe=folder.dated(plan.recipe), cfg=folder.dated(plan.cfg))
        folder.open(plan.recipe, resume)
        _show_notes(hooks.check_cluster(plan.recipe), display)
        # Only the owner of the folder may: another driver's checkpoint is incomplete while it is stored.
        _show_notes(_clean_notes(folder), display)
        prepared, steps = _prepare_run(plan, display)
        # Only now: whether a finished run has all of its steps depends on the number of prepared rows.
        if (finished := folder.finished_steps(of=steps)) is not None:
            display.note(f"the run has already finished with step {finished}: {folder.path}")
            yield OpenRun(result=result_of(folder, finished))
            return
        # `_resolve_reference` checks again with all inputs; this refuses changed data before the reference is scored.
        folder.check(prepared.fingerprint, steps)
        # The recipe, in which `bf16: auto` is the same on any machine.
        folder.write_config(_with_day(plan.recipe, prepared))
        plan, scores = _resolve_reference(plan, prepared, folder, steps, display)
        selection = _select(plan.cfg, prepared, scores, display)
        run, events, page = OpenRun(), RunEvents(folder), None
        events.started(plan.workers, sharding_of(plan.cfg))
        try:
            with tracking.running(display):
                run.plan = TrainingPlan(
                    **vars(plan),
                    folder=folder,
                    events=events,
                    prepared=prepared,
                    steps=steps,
                    debug=debug,
                    tracking=tracking,
                    scores=scores,
                    cancel=cancel,
                    owner=owner,
                    selection=selection,
                )
                with events:  # which write `run.json` as they end, so before it is finished
                    yield run
                folder.finish(run.returned["step"], run.returned["best_metric"], run.returned["ended_early"])
        finally:
            _write_findings(folder, display)
            page = hooks.write_page(folder, display)
        run.result = result_of(folder, run.returned["step"], page)


def _prepare_run(plan: RunPlan, display: Display) -> tuple[Prepared, int]:
    """Prepare the run's rows; return them, and its optimizer steps. Raises UserError for intervals that contradict these."""
    cfg = plan.cfg
    if cfg.bf16 and plan.recipe.bf16 == "auto" and not plan.workers.use_gpu:
        display.note(CPU_BF16)
    prepared = prepare_data(cfg, display)
    _show_notes(plan.strategy.notes(cfg, lambda name: prepared.read("train", [name])[name].to_pylist()), display)
    steps = plan.total_steps(selected_count(cfg, prepared.train_rows))
    schedule_arguments(cfg, RunLength(steps, steps, steps_per_epoch=None))  # raises for contradicting intervals
    if cfg.profile is not None and cfg.profile.steps[0] > steps:
        raise UserError(f"profile.steps: {beyond(cfg.profile.steps[0], steps)}")
    return prepared, steps


def _select(cfg: RunConfig, prepared: Prepared, scores: Scores | None, display: Display) -> Selection | None:
    """Return the training rows that `select:` keeps, of which a note is shown; None for all."""
    selection = select_rows(cfg, prepared, scores)
    if selection is not None:
        select = selection.select
        kept = f"{selection.rows} of {prepared.train_rows} training rows, by {select.by}, {select.side}"
        display.note(f"select: {kept}: {selection.columns.path}")
    return selection


def _write_findings(folder: RunFolder, display: Display) -> None:
    """Write what rules find in the run's records, also if it failed; on errors, note them: they don't fail the run."""
    try:
        write_findings(folder)
    except (UserError, *STORAGE_ERRORS) as error:
        display.note(f"{FINDINGS} is not written: {reason(error)}")


def _show_notes(notes: Iterable[str], display: Display) -> None:
    for note in notes:
        display.note(note)


def _clean_notes(folder: RunFolder) -> Iterator[str]:
    """Delete incomplete checkpoints of a run to resume, and yield a note for each."""
    for name in clean(folder.storage.filesystem, folder.storage.path):
        yield f"{name} is incomplete and was removed"


def _with_day(cfg: RunConfig, prepared: Prepared) -> RunConfig:
    """Set `template_date` to the day that chat templates printed, so that it stays the same when the run is resumed."""
    day = prepared.manifest["inputs"].get("template_date")
    return cfg if day is None else cfg.model_copy(update={"template_date": date.fromisoformat(day)})


def _resolve_reference(
    plan: RunPlan, prepared: Prepared, folder: RunFolder, steps: int, display: Display
) -> tuple[RunPlan, Scores | None]:
    """Return the plan with the workers' recipe, and cached scores; record both in `run.json`."""
    mode, cfg = plan.reference, pin_base(plan.cfg)
    scores = score_reference(cfg, prepared, display) if mode == "cached" else None
    # With an adapter, checkpoints lack the base's weights; a live reference computes with them at every step.
    base = base_fingerprint(cfg) if cfg.adapter is not None or mode == "live" else None
    folder.start(prepared.fingerprint, steps, scores.fingerprint if scores is not None else None, base)
    return replace(plan, cfg=cfg.model_copy(update={"reference": mode})), scores


def prepare_data(cfg: RunConfig, display: Display) -> Prepared:
    """Prepare the rows, and check that each fits a forward.

    Raises:
        UserError: as `pipeline.prepare`, and for a pair that doesn't fit, or rows that don't fit `ray.cache_size`.
    """
    display.stage("preparing data")
    prepared = prepare(cfg, progress=display.progress)
    sums = {
        name: sum(source[name] for source in prepared.manifest["sources"]) for name in ("rejected", "too_long", "duplicates")
    }
    left_out = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in sums.items() if number)
    display.note(
        f"prepared {prepared.train_rows} training and {prepared.eval_rows} evaluation rows"
        f"{f' (left out: {left_out})' if left_out else ''}: {prepared.path}"
    )
    for note in prepared.notes:
        display.note(note)
    check_training_budget(cfg, prepared)
    check_positions(cfg, prepared)
    check_embeddings(cfg, prepared)
    check_pictures(cfg, prepared)
    check_cache(cfg, prepared)
    return prepared


def score_reference(cfg: RunConfig, prepared: Prepared, display: Display) -> Scores:
    """Compute the reference's log-probabilities; its actors have ended on return, so that workers get their resources."""
    display.stage("scoring the reference")
    scores = score(cfg, prepared, progress=display.progress)
    rows = scores.train_rows + scores.eval_rows
    how = f"{scores.forwards} forwards" if scores.forwards else "they were there already"
    display.note(f"reference log-probabilities of {rows} rows: {scores.path} ({how})")
    if scores.padded_because:
        display.note(f"the reference scored one completion at a time: {scores.padded_because}")
    return scores
