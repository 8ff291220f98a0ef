"""One call of Ray's Tuner: new, or restored from what a stopped driver has left."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray import tune as ray_tune

from pipeline.config import RunConfig
from pipeline.display import Display
from pipeline.errors import RunStopped
from pipeline.paths import is_in_job_package
from pipeline.tracking.tracking import tracker_variables
from pipeline.training.stopping import StopSignal
from pipeline.tuning.folder import TUNE, SweepFolder
from pipeline.tuning.mailbox import open_mailbox
from pipeline.tuning.objectives import Measure
from pipeline.tuning.records import TrialRecord
from pipeline.tuning.searching import NEEDS_CHECKPOINTS, plan_search
from pipeline.tuning.sharing import value_of
from pipeline.tuning.space import Values
from pipeline.tuning.trial import TrialJob, TrialRun
from pipeline.tuning.watching import Relayed, Watch

__all__ = ["Tuning"]

TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the runs have logs of their own
    "TUNE_GLOBAL_CHECKPOINT_S": "2",  # what a killed driver has forgotten at most
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_RESULT_BUFFER_LENGTH": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # which prints at any verbosity
}


class Tuning:
    """One call of Ray's Tuner."""

    def __init__(
        self,
        cfg: RunConfig,
        folder: SweepFolder,
        measure: Measure,
        evaluations: int,
        concurrent: int,
        debug: bool,
        parent: str | None = None,
    ) -> None:
        self.cfg, self.folder, self.measure = cfg, folder, measure
        self.evaluations, self.concurrent, self.debug, self.parent = evaluations, concurrent, debug, parent

    def run(self, points: list[Values] | None, seed: int, display: Display) -> list[TrialRecord]:
        """Run the trials until Tune has enough of them.

        Raises:
            RunStopped, KeyboardInterrupt: when they were interrupted; the sweep can be continued.
        """
        assert self.cfg.tune is not None
        with open_mailbox() as mailbox, StopSignal() as stop:
            watch = Watch(self.folder, display, mailbox, self.measure, list(self.cfg.tune.space), stop)
            Relayed.watch = watch
            display.stage("running trials")
            with _environment(TUNE_ENVIRONMENT), _quiet(self.debug):
                self._tuner(mailbox, points, seed).fit()
            records = watch.close()
            Relayed.watch = None
            if watch.unfinished:
                again = "submit tune RECIPE --resume" if is_in_job_package() else f"tune --resume {self.folder.path}"
                advice = f"continue with `prefray {again}`"
                if stop.received:
                    raise RunStopped(f"stopped by SIGTERM; {advice}")
                display.note(f"interrupted: finished trials and the checkpoints of others stay; {advice}")
                raise KeyboardInterrupt
        return records

    def _tuner(self, mailbox: Any, points: list[Values] | None, seed: int) -> Any:
        section = self.cfg.tune
        assert section is not None
        at_checkpoints = section.scheduler in NEEDS_CHECKPOINTS
        environment = {**self.folder.environment(), **tracker_variables(self.cfg)}
        job = TrialJob(
            self.cfg,
            self.folder.path,
            os.getcwd(),
            mailbox,
            self.evaluations,
            at_checkpoints,
            self.debug,
            environment,
            self.parent,
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
        plan = plan_search(section, self.measure, points, self.evaluations, seed, own)
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


def _node_resource() -> str:
    """The resource that only the driver's node has."""
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
