"""A sweep as a whole: check the space, prepare and score once, let Tune run the trials, collect what they leave."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cluster.preflight import WorkerPlan, count_runs, plan_workers
from pipeline.config import RunConfig
from pipeline.display import Display, SilentDisplay
from pipeline.errors import RunFailed, RunStopped, UserError
from pipeline.paths import absolute_paths
from pipeline.session import connect, node_resources
from pipeline.storage import Location, inside, locate
from pipeline.training.driver import check_batch, check_recipe
from pipeline.training.stopping import StopSignal
from pipeline.tuning.cadence import with_cadence
from pipeline.tuning.folder import BEST, REPORT, TUNE, SweepFolder, recipe_text
from pipeline.tuning.objectives import Measure, measure_of
from pipeline.tuning.records import TrialRecord, table_of
from pipeline.tuning.sharing import Shared, share, value_of
from pipeline.tuning.space import check_trials, corners, trial_recipe
from pipeline.tuning.table import best_record, winners

if TYPE_CHECKING:
    import pandas

__all__ = ["SweepResult", "tune"]

ONE_RUNS = ("hub_model_id", "wandb_run_id")
"""Keys that several runs can't have."""
TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the runs have logs of their own
    "TUNE_GLOBAL_CHECKPOINT_S": "2",  # what a killed driver has forgotten at most
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_RESULT_BUFFER_LENGTH": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # which prints at any verbosity
}


@dataclass(frozen=True)
class SweepResult:
    """What a sweep has left."""

    run_dir: Location
    """Trials, tables, best recipe, report: a Path, or the text of a URI."""
    cfg: RunConfig
    measure: Measure
    records: list[TrialRecord] = field(repr=False)

    @property
    def best(self) -> TrialRecord | None:
        """The best trial by the first metric; None where none has evaluated, or none is within the constraints."""
        return best_record(self.records, self.measure)

    @property
    def front(self) -> list[TrialRecord]:
        """The best trial, or of several metrics those that no other one beats in all of them (Pareto front)."""
        numbers = winners(self.records, self.measure)
        return [record for record in self.records if record.number in numbers]

    @property
    def best_config(self) -> RunConfig:
        """Recipe of the best trial, ready to be trained.

        Raises:
            RunFailed: when there is no best trial.
        """
        if self.best is None:
            raise RunFailed(_no_best(self.records, self.measure))
        return trial_recipe(self.cfg, self.best.values, str(inside(self.run_dir, "best")))

    @property
    def best_metrics(self) -> dict[str, float]:
        """Metrics of the best trial's last evaluation; empty when there is none."""
        return {} if self.best is None else self.best.metrics

    @cached_property
    def table(self) -> pandas.DataFrame:
        """One row per trial: values, status, metrics of the last evaluation, cost."""
        assert self.cfg.tune is not None
        return table_of(self.records, list(self.cfg.tune.space))

    @property
    def report(self) -> Location:
        """The page that shows it all."""
        return inside(self.run_dir, REPORT)


def tune(cfg: RunConfig, *, resume: bool = False, display: Display | None = None, debug: bool = False) -> SweepResult:
    """Run the sweep that the recipe's `tune:` section describes; its files go to `output_dir`.

    Args:
        cfg: the recipe.
        resume: continue the sweep that `output_dir` holds: finished trials stay, others go on from their checkpoints.
        display: shows stages, trials and notes; nothing is shown when None.
        debug: let the output of workers, and Tune's own, through.

    Raises:
        UserError: for anything that the user can mend; what can be known before trials start is said then.
        RunFailed: when every trial has failed, or none is within the constraints.
    """
    if cfg.tune is None:
        raise UserError("tune: the recipe has no `tune:` section; give it one with a `space`, or use `prefray train`")
    from pipeline.tuning.searching import drawn_points

    for key in ONE_RUNS:
        if getattr(cfg, key) is not None:
            raise UserError(f"{key}: belongs to one run, and a sweep has many; remove it, and set it when you train best.yaml")
    display = display or SilentDisplay()
    given, cfg = with_cadence(cfg), with_cadence(absolute_paths(cfg))
    assert cfg.tune is not None
    seed = cfg.seed if cfg.tune.seed is None else cfg.tune.seed
    points = drawn_points(cfg.tune, seed)
    recipes = check_trials(cfg, corners(cfg.tune))
    known = [trial_recipe(cfg, None, cfg.output_dir)] if cfg.tune.baseline else []
    known += check_trials(cfg, points or [])
    recipes += known
    for recipe in recipes:
        check_recipe(recipe)
    measure = measure_of(cfg.tune, recipes)
    folder = SweepFolder(locate(cfg.output_dir))
    folder.open(given, resume)
    state = folder.state() or {}
    if state["status"] == "finished":
        display.note(f"the sweep has already finished: {folder.path}")
        return _judged(SweepResult(folder.path, given, measure, folder.records()))
    display.stage("starting Ray")
    connect(cfg, debug)
    concurrent = _concurrency(cfg, recipes)
    shared = share(cfg, known if points is not None else recipes, display)
    if "shared" in state:  # what it has cost was told when it was made
        shared = Shared(**state["shared"])
    folder.write_state({"status": "started", "shared": shared.summary()})
    records = _Sweep(cfg, folder, measure, shared, concurrent, debug).run(points, seed, display)
    return _collect(SweepResult(folder.path, given, measure, records), folder, shared, display)


def _concurrency(cfg: RunConfig, recipes: list[RunConfig]) -> int:
    """Trials at once: as many as the cluster has room for, or as the config says.

    Raises:
        UserError: when not even one fits, or fewer than the config says.
    """
    assert cfg.tune is not None
    room = min(count_runs(_workers(recipe), node_resources()) for recipe in recipes)
    wanted = cfg.tune.max_concurrent_trials
    if wanted is not None and wanted > room:
        raise UserError(
            f"tune.max_concurrent_trials: {wanted} trials don't fit the cluster at once, {room} do; ask for fewer, for smaller "
            "trials (ray.num_workers, ray.resources_per_worker), or add nodes"
        )
    return wanted or room


def _workers(recipe: RunConfig) -> WorkerPlan:
    least = recipe.min_workers if recipe.is_elastic else None
    try:
        plan = plan_workers(recipe.num_workers, recipe.ray.use_gpu, recipe.worker_resources(), node_resources(), least)
    except ValueError as error:
        raise UserError(f"no trial can run: {error}") from error
    check_batch(recipe, plan.num_workers)
    return plan


class _Sweep:
    """One call of Ray's Tuner."""

    def __init__(
        self, cfg: RunConfig, folder: SweepFolder, measure: Measure, shared: Shared, concurrent: int, debug: bool
    ) -> None:
        self.cfg, self.folder, self.measure, self.shared = cfg, folder, measure, shared
        self.concurrent, self.debug = concurrent, debug

    def run(self, points: Any, seed: int, display: Display) -> list[TrialRecord]:
        """Run the trials until Tune has enough of them.

        Raises:
            RunStopped, KeyboardInterrupt: when they were interrupted; the sweep can be continued.
        """
        from pipeline.tuning.mailbox import open_mailbox
        from pipeline.tuning.watching import Relayed, Watch

        assert self.cfg.tune is not None
        mailbox = open_mailbox()
        with StopSignal() as stop:
            watch = Watch(self.folder, display, mailbox, self.measure, list(self.cfg.tune.space), stop)
            Relayed.watch = watch
            display.stage("running trials")
            with _environment(TUNE_ENVIRONMENT), _quiet(self.debug):
                self._tuner(mailbox, points, seed).fit()
            records = watch.close()
            Relayed.watch = None
            if watch.unfinished:
                advice = f"continue with `prefray tune --resume {self.folder.path}`"
                if stop.received:
                    raise RunStopped(f"stopped by SIGTERM; {advice}")
                display.note(f"interrupted: finished trials and the checkpoints of others stay; {advice}")
                raise KeyboardInterrupt
        return records

    def _tuner(self, mailbox: Any, points: Any, seed: int) -> Any:
        from ray import tune as ray_tune

        from pipeline.tuning.searching import NEEDS_CHECKPOINTS, plan_search
        from pipeline.tuning.trial import TrialJob, TrialRun
        from pipeline.tuning.watching import Relayed

        section = self.cfg.tune
        assert section is not None
        evaluations = self.shared.evaluations
        at_checkpoints = section.scheduler in NEEDS_CHECKPOINTS
        job = TrialJob(
            self.cfg, self.folder.path, os.getcwd(), mailbox, evaluations, at_checkpoints, self.debug, self.folder.environment()
        )
        # Where the driver is, as Ray Train's own controllers are; and no more at once than have room for their workers.
        slot = {_node_resource(): math.floor(10_000 / self.concurrent) / 10_000}
        trainable = ray_tune.with_resources(ray_tune.with_parameters(TrialRun, job=job), slot)
        place = self.folder.for_tune()
        where = f"{place['storage_path']}/{TUNE}"
        if ray_tune.Tuner.can_restore(where, storage_filesystem=place["storage_filesystem"]):
            return ray_tune.Tuner.restore(
                where, trainable, storage_filesystem=place["storage_filesystem"], resume_unfinished=True
            )
        own = {key: value_of(self.cfg, key) for key in section.space}
        own = {key: value for key, value in own.items() if value is not None}
        plan = plan_search(section, self.measure, points, evaluations, seed, own)
        return ray_tune.Tuner(
            trainable,
            param_space=plan.space,
            tune_config=ray_tune.TuneConfig(
                search_alg=plan.search,
                scheduler=plan.scheduler,
                num_samples=1 if points is not None else plan.trials,
                reuse_actors=True,
                time_budget_s=section.time_budget,
            ),
            run_config=ray_tune.RunConfig(
                **place,
                failure_config=ray_tune.FailureConfig(max_failures=section.max_failures),
                checkpoint_config=ray_tune.CheckpointConfig(checkpoint_at_end=False),
                callbacks=[Relayed()],
                verbose=2 if self.debug else 0,
            ),
        )


def _collect(result: SweepResult, folder: SweepFolder, shared: Shared, display: Display) -> SweepResult:
    """Write tables, the best recipe and the report."""
    from pipeline.report.sweep import sweep_page

    display.stage("writing the report")
    if result.best is not None:
        folder.storage.write(BEST, _best_recipe(result))
    folder.write_table(result.table)
    folder.storage.write(REPORT, sweep_page(result, folder, shared))
    folder.write_state({"status": "finished"})
    return _judged(result)


def _judged(result: SweepResult) -> SweepResult:
    """The result, when there is a best trial.

    Raises:
        RunFailed: when there is none.
    """
    if all(record.status == "failed" for record in result.records):
        reasons = dict.fromkeys(record.reason for record in result.records)
        raise RunFailed(f"every trial has failed: {'; '.join(map(str, reasons))} (report: {result.report})")
    if result.best is None:
        raise RunFailed(f"{_no_best(result.records, result.measure)} (report: {result.report})")
    return result


def _no_best(records: list[TrialRecord], measure: Measure) -> str:
    if any(record.metrics for record in records) and measure.constraints:
        bounds = ", ".join(f"{name} {bounds.model_dump(exclude_none=True)}" for name, bounds in measure.constraints.items())
        return f"there is no best trial: none is within the constraints ({bounds})"
    return "there is no best trial: none has evaluated"


def _best_recipe(result: SweepResult) -> str:
    best = result.best
    assert best is not None
    metrics = ", ".join(f"{one.metric} {best.metrics[one.metric]:.6g}" for one in result.measure.objectives)
    lines = [f"# Trial {best.name} of the sweep in {result.run_dir}: {metrics} at step {best.step} of {best.total_steps}."]
    if best.origins:
        lines.append(f"# It went on from {'; '.join(best.origins)}: one recipe doesn't lead there again.")
    return "\n".join([*lines, recipe_text(result.best_config)])


def _node_resource() -> str:
    """The resource that only the driver's node has."""
    import ray

    own = ray.get_runtime_context().get_node_id()
    resources = next(node["Resources"] for node in ray.nodes() if node["NodeID"] == own)
    return next(name for name in resources if name.startswith("node:") and not name.startswith("node:__"))


@contextmanager
def _quiet(debug: bool) -> Iterator[None]:
    """Keep what Tune says of its own files to itself; what happens to trials is told by them."""
    logger = logging.getLogger("ray.tune")
    level = logger.level
    logger.setLevel(level if debug else logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Variables that Tune reads while it runs."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
