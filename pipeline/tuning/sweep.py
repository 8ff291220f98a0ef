"""A sweep as a whole: check the space, prepare and score once, let Tune run the trials, collect what they leave."""

from __future__ import annotations

from cluster.preflight import count_runs
from pipeline.config import RunConfig
from pipeline.display import Display
from pipeline.doctor.examination import check_before_run
from pipeline.errors import UserError
from pipeline.notebook import default_display
from pipeline.paths import absolute_paths
from pipeline.session import connect, node_resources
from pipeline.storage import locate
from pipeline.tracking.of_sweep import SweepTracking
from pipeline.tracking.tracking import check_trackers
from pipeline.training.driver import check_batch, check_recipe, plan_run
from pipeline.tuning.cadence import with_cadence
from pipeline.tuning.folder import BEST, REPORT, SweepFolder
from pipeline.tuning.objectives import measure_of
from pipeline.tuning.result import SweepResult, best_recipe, judged
from pipeline.tuning.sharing import Shared, share
from pipeline.tuning.space import check_trials, corners, trial_recipe

__all__ = ["SweepResult", "tune"]

ONE_RUNS = ("hub_model_id", "wandb_run_id")
"""Keys that several runs can't have."""


def tune(cfg: RunConfig, *, resume: bool = False, display: Display | None = None, debug: bool = False) -> SweepResult:
    """Run the sweep that the recipe's `tune:` section describes; its files go to `output_dir`.

    Args:
        cfg: the recipe.
        resume: continue the sweep that `output_dir` holds: finished trials stay, others go on from their checkpoints.
        display: shows stages, trials and notes; when None, progress is shown in a notebook and nothing elsewhere.
        debug: let the output of workers, and Tune's own, through.

    Raises:
        UserError: for anything that the user can mend; what can be known before trials start is said then.
        RunFailed: when every trial has failed, or none is within the constraints.
    """
    if cfg.tune is None:
        raise UserError("tune: the recipe has no `tune:` section; give it one with a `space`, or use `prefray train`")
    from pipeline.tuning.running import Tuning
    from pipeline.tuning.searching import drawn_points

    for key in ONE_RUNS:
        if getattr(cfg, key) is not None:
            raise UserError(f"{key}: belongs to one run, and a sweep has many; remove it, and set it when you train best.yaml")
    display = display or default_display()
    given = with_cadence(cfg)
    cfg = absolute_paths(given)
    assert cfg.tune is not None
    seed = cfg.seed if cfg.tune.seed is None else cfg.tune.seed
    points = drawn_points(cfg.tune, seed)
    recipes = check_trials(cfg, corners(cfg.tune))
    known = [trial_recipe(cfg, None, cfg.output_dir)] if cfg.tune.baseline else []
    known += check_trials(cfg, points or [])
    recipes += known
    for recipe in recipes:
        check_recipe(recipe)
    check_trackers(cfg)
    measure = measure_of(cfg.tune, recipes)
    folder = SweepFolder(locate(cfg.output_dir))
    folder.open(given, resume)
    state = folder.state() or {}
    if state["status"] == "finished":
        display.note(f"the sweep has already finished: {folder.path}")
        return judged(SweepResult(folder.path, given, measure, folder.records()))
    for note in cfg.notes:
        display.note(note)
    display.stage("starting Ray")
    connect(cfg, debug)
    for note in check_before_run(cfg):
        display.note(note)
    concurrent = _concurrency(cfg, recipes, display)
    shared = share(cfg, known if points is not None else recipes, display)
    if "shared" in state:  # what it has cost was told when it was made
        shared = Shared(**state["shared"])
    folder.write_state({"status": "started", "shared": shared.summary()})
    with SweepTracking(cfg, folder, display) as tracking:
        tuning = Tuning(cfg, folder, measure, shared.evaluations, concurrent, debug, tracking.parent)
        records = tuning.run(points, seed, display)
        result = _collect(SweepResult(folder.path, given, measure, records), folder, shared, display)
        tracking.add(result.best_metrics, [BEST, REPORT])
    return result


def _concurrency(cfg: RunConfig, recipes: list[RunConfig], display: Display) -> int:
    """Trials at once: as many as the cluster has room for, or fewer, as the config says.

    Raises:
        UserError: when not even one fits.
    """
    assert cfg.tune is not None
    nodes = node_resources()
    room = min(_room_for(recipe, nodes) for recipe in recipes)
    wanted = cfg.tune.max_concurrent_trials
    if wanted is not None and wanted > room:
        display.note(
            f"tune.max_concurrent_trials: {room} of {wanted} trials fit the cluster at once, so that many run; for more, "
            "ask for smaller trials (ray.num_workers, ray.resources_per_worker), or add nodes"
        )
    return min(wanted or room, room)


def _room_for(recipe: RunConfig, nodes: list[dict[str, float]]) -> int:
    try:
        workers = plan_run(recipe, nodes)
    except ValueError as error:
        raise UserError(f"no trial can run: {error}") from error
    check_batch(recipe, workers.num_workers)
    return count_runs(workers, nodes)


def _collect(result: SweepResult, folder: SweepFolder, shared: Shared, display: Display) -> SweepResult:
    """Write tables, the best recipe and the report."""
    from pipeline.report.sweep import sweep_page

    display.stage("writing the report")
    if result.best is not None:
        folder.storage.write(BEST, best_recipe(result))
    folder.write_table(result.table)
    folder.storage.write(REPORT, sweep_page(result, folder, shared))
    folder.write_state({"status": "finished"})
    return judged(result)
