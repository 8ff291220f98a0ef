"""Entry point of a sweep: validate the space, run the shared stages, run the trials with Tune, write the results."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from cluster.division import divided_layers
from cluster.placement import count_runs
from pipeline import tuning
from pipeline.config import RunConfig
from pipeline.config.paths import absolute_paths
from pipeline.data.store import check_root
from pipeline.doctor.examination import check_before_run
from pipeline.doctor.memory import this_machine
from pipeline.errors import UserError
from pipeline.io.cache import NodeCache
from pipeline.io.retry import STORAGE_ERRORS
from pipeline.io.storage import locate
from pipeline.planning import check_batch, check_recipe, plan_run
from pipeline.ray.session import init_ray, node_resources
from pipeline.runs.owner import owned
from pipeline.tracking.dispatcher import Tracking, check_trackers
from pipeline.training.sharing import base_bytes, fitting_slots, why_not_shared
from pipeline.tuning.eval_schedule import with_cadence
from pipeline.tuning.finalists import choose_finalists, plan_repeats
from pipeline.tuning.folder import BEST, REPORT, SweepFolder, earlier_tracker_runs
from pipeline.tuning.objective import resolve_objective
from pipeline.tuning.records import TrialRecord
from pipeline.tuning.result import SweepResult, best_recipe, raise_without_best
from pipeline.tuning.shared_stages import SharedStages, prepare_shared_stages
from pipeline.tuning.sharing import Sharing, check_slots, plan_sharing, unused_note
from pipeline.tuning.space import check_trials, corners, trial_recipe
from pipeline.ui.display import Display
from pipeline.ui.notebook import default_display

if TYPE_CHECKING:
    from pipeline.tuning.tuner import SweepTuner

__all__ = ["SweepResult", "run_sweep"]

ONE_RUNS = ("hub_model_id", "wandb_run_id")
"""Keys that only a single run can have."""


SweepPage = Callable[["SweepResult", SweepFolder, SharedStages], str]
"""Renders a sweep's page as HTML."""


def run_sweep(
    cfg: RunConfig, page: SweepPage, *, resume: bool = False, display: Display | None = None, debug: bool = False
) -> SweepResult:
    """Run a sweep, as documented at `pipeline.tune`.

    Args:
        cfg, resume, display, debug: those of `pipeline.tune`.
        page: renders the sweep's page.

    Raises:
        UserError: for errors that the user can fix, before trials start where possible.
        RunFailed: when every trial has failed, or none meets the constraints.
    """
    if cfg.tune is None:
        raise UserError("tune: the recipe has no `tune:` section; give it one with a `space`, or use `prefray train`")
    for key in ONE_RUNS:
        if getattr(cfg, key) is not None:
            raise UserError(f"{key}: belongs to one run, and a sweep has many; remove it, and set it when you train best.yaml")
    display = display or default_display()
    # Saved with its paths as they were written; a resumed sweep makes them absolute again.
    saved_cfg = with_cadence(cfg)
    cfg = absolute_paths(saved_cfg)
    assert cfg.tune is not None
    seed = cfg.seed if cfg.tune.seed is None else cfg.tune.seed
    points = tuning.drawn_points(cfg.tune, seed)
    recipes = check_trials(cfg, corners(cfg.tune))
    trials = [trial_recipe(cfg, None, cfg.output_dir)] if cfg.tune.baseline else []
    trials += check_trials(cfg, points or [])
    recipes += trials
    # All of them: a trial that can't run would be found hours later.
    for recipe in recipes:
        check_recipe(recipe)
    check_trackers(cfg)
    measure = resolve_objective(cfg.tune, recipes)
    sharing = plan_sharing(cfg.tune.share_base, trials if points is not None else recipes)
    if sharing is None and cfg.tune.slots is not None:
        why = "; ".join(f"{key}: {reason}" for key, reason in why_not_shared(recipes[0])) or "there are too few trials"
        raise UserError(f"tune.slots: has no effect, since no trials share a base ({why}); remove it")
    folder = SweepFolder(locate(cfg.output_dir))
    check_root(cfg.dataset_prepared_path)
    NodeCache.of(cfg.ray).check_path()
    with owned(folder.storage) as owner:
        folder.open(saved_cfg, resume)
        state = folder.state() or {}
        if state["status"] == "finished":
            display.note(f"the sweep has already finished: {folder.path}")
            return raise_without_best(SweepResult(folder.path, saved_cfg, measure, folder.records()))
        unused = unused_note(cfg.tune.share_base, sharing)
        for note in (*cfg.notes, *([unused] if unused else [])):
            display.note(note)
        display.stage("starting Ray")
        init_ray(cfg, debug)
        for note in check_before_run(cfg):
            display.note(note)
        concurrent = _concurrency(cfg, recipes, display)
        if sharing is not None:
            number = tuning.count_trials(cfg.tune, points)
            sharing, concurrent = _share(cfg, sharing, recipes, concurrent, number, display)
        shared = prepare_shared_stages(cfg, trials if points is not None else recipes, display)
        if sharing is not None:
            slots = sharing.hosts * sharing.slots
            shared = replace(shared, copies=sharing.hosts, slots=slots, base_bytes=base_bytes(sharing.recipe))
        if "shared" in state:  # resumed: report the cost of the first time, not of reopening cached stages
            shared = SharedStages(**state["shared"])
        folder.write_state({"status": "started", "shared": shared.summary()})
        tracking = Tracking(cfg, folder.storage, resume, is_sweep=True, saved=earlier_tracker_runs(state))
        began = time.monotonic()
        with tracking.running(display):
            run_by = owner, tracking.ids, recipes, sharing
            tuner = tuning.SweepTuner(cfg, folder, measure, shared.evaluations, concurrent, debug, *run_by)
            try:
                with tuner.opened():
                    records = tuner.search(points, seed, display) if "finalists" not in state else folder.records()
                    if cfg.tune.finalists is not None:
                        records = _repeat_finalists(cfg, tuner, folder, records, time.monotonic() - began, display)
            finally:
                shared = shared.with_starts(tuner.starts)
                if not owner.is_lost:
                    with suppress(*STORAGE_ERRORS):  # which `_collect` meets, too
                        folder.write_state({"shared": shared.summary()})
            result = _collect(SweepResult(folder.path, saved_cfg, measure, records), folder, shared, page, display)
            tracking.add_result(result.best_metrics, [BEST, REPORT])
        return result


def _repeat_finalists(
    cfg: RunConfig,
    tuner: SweepTuner,
    folder: SweepFolder,
    records: list[TrialRecord],
    spent: float,
    display: Display,
) -> list[TrialRecord]:
    """Repeat the best trials with other seeds; return the records of all trials.

    Args:
        spent: seconds of the time budget that the search has taken.
    """
    assert cfg.tune is not None and cfg.tune.finalists is not None
    planned = (folder.state() or {}).get("finalists")
    if planned is None:
        chosen = choose_finalists(records, tuner.measure, cfg.tune.finalists.num)
        planned = plan_repeats(cfg, chosen, max((record.number for record in records), default=-1) + 1)
        # Before the first of them begins: a resumed sweep repeats the same ones.
        folder.write_state({"finalists": planned})
    left = None if cfg.tune.time_budget is None else cfg.tune.time_budget - spent
    numbers = sorted({trial["repeats"] for trial in planned})
    if not numbers:
        display.note("tune.finalists: no trial has finished within the constraints, so none is repeated")
    elif left is not None and left <= 0:
        display.note("tune.time_budget: the search has taken all of it, so its best trials are not repeated with other seeds")
    else:
        listed = ", ".join(map(str, numbers))
        display.note(f"finalists: {len(planned)} runs repeat trial{'s' * (len(numbers) != 1)} {listed} with other seeds")
        return tuner.repeat(planned, left, display)
    return records


def _share(
    cfg: RunConfig, sharing: Sharing, recipes: list[RunConfig], capacity: int, trials: int, display: Display
) -> tuple[Sharing, int]:
    """Decide hosts and slots; return them with the number of trials at once.

    Args:
        recipes: those of `_concurrency`.
        capacity: runs that fit the cluster at once.
        trials: of the sweep.
    """
    assert cfg.tune is not None
    recipe = sharing.recipe
    machine = this_machine(recipe.ray.use_gpu)
    copies = 1 if machine.kind == "GPU" else capacity * recipe.num_workers
    # On all of the cluster, unless slots are given: then on as many hosts as have them.
    each = -(-trials // min(capacity, trials))
    alike = (one for one in recipes if not why_not_shared(one, recipe))
    slots = check_slots(cfg.tune.slots, fitting_slots(alike, copies, machine), each)
    hosts = min(capacity, -(-trials // slots))
    display.note(f"up to {slots} trials share one copy of the base model{f', of which there are {hosts}' * (hosts > 1)}")
    if divided_layers(recipe) is not None:
        key = "deepspeed: zero3" if recipe.deepspeed is not None else "fsdp_config"
        display.note(f"{key}: {recipe.num_workers} workers divide the layers of a copy by FSDP2; adapters are whole on each")
    for reason in sharing.reasons:
        display.note(f"trials with workers of their own: {reason}")
    limit = cfg.tune.max_concurrent_trials or trials
    return replace(sharing, hosts=hosts, slots=slots), min(hosts * slots, limit)


def _concurrency(cfg: RunConfig, recipes: list[RunConfig], display: Display) -> int:
    """Return how many trials run at once: as many as fit the cluster, at most `tune.max_concurrent_trials`.

    Raises:
        UserError: when not even one trial fits.
    """
    assert cfg.tune is not None
    nodes = node_resources()
    # Of the largest: with a searched number of workers, any trials may run beside each other.
    capacity = min(_capacity(recipe, nodes) for recipe in recipes)
    limit = cfg.tune.max_concurrent_trials
    if limit is not None and limit > capacity:
        display.note(
            f"tune.max_concurrent_trials: {capacity} of {limit} trials fit the cluster at once, so that many run; for more, "
            "ask for smaller trials (ray.num_workers, ray.resources_per_worker), or add nodes"
        )
    return min(limit or capacity, capacity)


def _capacity(recipe: RunConfig, nodes: list[dict[str, float]]) -> int:
    try:
        workers = plan_run(recipe, nodes)
    except ValueError as error:
        raise UserError(f"no trial can run: {error}") from error
    check_batch(recipe, workers.num_workers)
    return count_runs(workers, nodes)


def _collect(result: SweepResult, folder: SweepFolder, shared: SharedStages, page: SweepPage, display: Display) -> SweepResult:
    """Write the tables, the best recipe and the report."""
    display.stage("writing the report")
    if result.best is not None:
        folder.storage.write(BEST, best_recipe(result))
    folder.write_table(result.table)
    folder.storage.write(REPORT, page(result, folder, shared))
    # Last: a sweep that failed to write its report writes it when it is resumed.
    folder.write_state({"status": "finished"})
    return raise_without_best(result)
