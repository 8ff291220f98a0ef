"""Calls of Ray's Tuner: each is new, or restored from the state of an interrupted driver."""

from __future__ import annotations

import logging
import math
import os
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import ray
from ray import tune as ray_tune

from cluster.environment import environment
from cluster.ray_compat import own_interrupts, remove_orphaned_groups, trials_without_keys, tune_controllers
from pipeline.config import RunConfig
from pipeline.config.paths import is_in_job_package, uris_of
from pipeline.errors import RunFailed, RunStopped
from pipeline.io.retry import STORAGE_ERRORS
from pipeline.io.storage import S3_VARIABLES
from pipeline.planning import resolve
from pipeline.ray.channel import NodeChannel
from pipeline.ray.session import node_resources
from pipeline.runs.owner import Ownership
from pipeline.tracking.dispatcher import tracker_variables
from pipeline.training.host import HostPlan, Hosts, HostStart
from pipeline.training.one_host import IDLE_S
from pipeline.training.signals import SigtermHandler
from pipeline.tuning.channel import SweepChannel
from pipeline.tuning.control import TrialControl
from pipeline.tuning.earlier import earlier_names
from pipeline.tuning.folder import FINALISTS, HOSTS, TUNE, SweepFolder
from pipeline.tuning.monitor import MonitorCallback, QuietProgress, SweepMonitor
from pipeline.tuning.objective import SweepObjective
from pipeline.tuning.records import TrialRecord
from pipeline.tuning.requests import forget
from pipeline.tuning.search import NEEDS_CHECKPOINTS, Plan, count_trials, plan_repeats, plan_search
from pipeline.tuning.shared_stages import value_of
from pipeline.tuning.sharing import Sharing
from pipeline.tuning.space import Values
from pipeline.tuning.trial import TrialJob, TrialRun
from pipeline.ui.display import Display

__all__ = ["SweepTuner"]

TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the runs write their logs themselves
    "TUNE_GLOBAL_CHECKPOINT_S": "2",  # a killed driver loses at most this much of Tune's state
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    # A buffer would run several `step` calls at once, past the evaluation at which a scheduler decides.
    "TUNE_RESULT_BUFFER_LENGTH": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output ignores verbosity
}
BETWEEN_S = 20.0
"""Seconds that hosts without a trial are kept where finalists follow the search, whose end takes Tune up to ten."""
ENDING_S = 10.0
"""How long processes that Tune kills may take to end."""
ENDING_EVERY_S = 0.5


class SweepTuner:
    """Calls of Ray's Tuner: the search, and then the runs that repeat finalists, in slots of the same hosts."""

    def __init__(
        self,
        cfg: RunConfig,
        folder: SweepFolder,
        measure: SweepObjective,
        evaluations: int,
        concurrent: int,
        debug: bool,
        owner: Ownership,
        parents: dict[str, str],
        recipes: list[RunConfig],
        sharing: Sharing | None = None,
    ) -> None:
        self.cfg, self.folder, self.measure = cfg, folder, measure
        self.evaluations, self.concurrent, self.debug = evaluations, concurrent, debug
        self.owner, self.parents, self.recipes, self.sharing = owner, parents, recipes, sharing
        self.starts: list[HostStart] = []
        """Of hosts that have ended."""
        self._hosts: Hosts | None = None
        self._stop = SigtermHandler()
        self._at_the_end = ExitStack()

    def search(self, points: list[Values] | None, seed: int, display: Display) -> list[TrialRecord]:
        """Run the trials of the search, and return their records; errors are those of `repeat`."""
        display.stage("running trials")
        assert self.cfg.tune is not None
        # Beyond the numbers that the search gives.
        first_clone = count_trials(self.cfg.tune, points)
        return self._run(TUNE, partial(self._plan, points, seed), self.cfg.tune.time_budget, first_clone, display)

    def repeat(self, configs: list[dict[str, Any]], time_budget: float | None, display: Display) -> list[TrialRecord]:
        """Run the trials that repeat finalists, and return the records of all trials.

        Args:
            configs: those of `finalists.plan_repeats`.
            time_budget: seconds.

        Raises:
            RunStopped, KeyboardInterrupt: when interrupted; the sweep can be resumed.
            RunFailed: when another process has taken the folder over.
        """
        display.stage("repeating the finalists with other seeds")
        return self._run(FINALISTS, partial(plan_repeats, configs), time_budget, None, display)

    def _run(
        self, name: str, plan: Callable[[], Plan], time_budget: float | None, first_clone: int | None, display: Display
    ) -> list[TrialRecord]:
        """Run trials whose state Tune keeps in the folder `name`."""
        assert self.cfg.tune is not None
        forget(self.folder)
        control = TrialControl(self.cfg, self.recipes, self.measure, self.folder, first_clone)
        keys = list(self.cfg.tune.space)
        self._start_hosts(display)
        with SweepChannel.opened() as channel, own_interrupts(), self._patches(control):
            watched = keys, self._stop, self.owner, control, self.sharing
            monitor = SweepMonitor(self.folder, display, channel, self.measure, *watched)
            MonitorCallback.monitor = monitor
            try:
                self._tuner(channel, name, plan, time_budget).fit()
            finally:
                MonitorCallback.monitor = None
                records = monitor.close()
            if self._hosts is not None:
                self._hosts.check()
            if self.owner.is_lost:
                raise RunFailed(self.owner.message())
            if monitor.unfinished:
                here = f"tune --resume {shlex.quote(str(self.folder.path))}"
                again = "submit tune RECIPE --resume" if is_in_job_package() else here
                advice = f"continue with `prefray {again}`"
                if self._stop.received:
                    raise RunStopped(f"stopped by SIGTERM; {advice}")
                display.note(f"interrupted: finished trials and the checkpoints of others stay; {advice}")
                raise KeyboardInterrupt
        return records

    @contextmanager
    def _patches(self, control: TrialControl) -> Iterator[None]:
        quiet, controllers = _quiet(self.debug), tune_controllers(control.attach)
        with environment(TUNE_ENVIRONMENT), trials_without_keys(), quiet, earlier_names(), controllers:
            yield

    def _plan(self, points: list[Values] | None, seed: int) -> Plan:
        section = self.cfg.tune
        assert section is not None
        baseline = {key: value_of(self.cfg, key) for key in section.space}
        baseline = {key: value for key, value in baseline.items() if value is not None}
        return plan_search(section, self.measure, points, self.evaluations, seed, baseline)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """End trials on SIGTERM, and hosts with the context, in which `search` and `repeat` are called."""
        groups = remove_orphaned_groups()
        with self._stop:
            try:
                with self._at_the_end:
                    yield
            finally:
                if self.sharing is not None:
                    with suppress(*STORAGE_ERRORS):
                        self.folder.storage.delete(HOSTS)
                # Tune kills the process of a trial that takes long to end, as where its workers are just starting.
                deadline = time.monotonic() + ENDING_S
                while remove_orphaned_groups() > groups and time.monotonic() < deadline:
                    time.sleep(ENDING_EVERY_S)

    def _start_hosts(self, display: Display) -> None:
        """Start hosts where trials share a base, once."""
        if self.sharing is not None and self._hosts is None:
            self._hosts = self._at_the_end.enter_context(self._opened_hosts(self.sharing, display))

    @contextmanager
    def _opened_hosts(self, shared: Sharing, display: Display) -> Iterator[Hosts]:
        storage = self.folder.for_tune("host")
        storage["storage_path"] += f"/{HOSTS}"
        run = resolve(shared.recipe, node_resources())
        assert self.cfg.tune is not None
        idle = IDLE_S if self.cfg.tune.finalists is None else BETWEEN_S
        plan = HostPlan(run, shared.hosts, shared.slots, storage, os.getcwd(), self.debug, idle)
        with NodeChannel.opened() as channel, Hosts(plan, channel, display.note) as opened:
            try:
                yield opened
            finally:
                self.starts += opened.starts

    def _tuner(
        self,
        channel: SweepChannel,
        name: str,
        make_plan: Callable[[], Plan],
        time_budget: float | None,
    ) -> Any:
        section = self.cfg.tune
        assert section is not None
        at_checkpoints = section.scheduler in NEEDS_CHECKPOINTS
        # Each trial looks at its data and models itself.
        of_stores = S3_VARIABLES if any(uris_of(self.cfg)) else ()
        variables = {name: os.environ[name] for name in of_stores if name in os.environ} | tracker_variables(self.cfg)
        job = TrialJob(
            self.cfg,
            self.folder.path,
            os.getcwd(),
            channel,
            self.evaluations,
            at_checkpoints,
            self.debug,
            variables,
            self.parents,
            self.sharing,
            None if self._hosts is None else self._hosts.channel,
        )
        # A fraction of the driver's node resource: trials run on its node, as Ray Train's controllers do, and at most
        # `concurrent` at once, so that their workers fit the cluster.
        # Rounded down to 0.0001, Ray's smallest unit: rounded up, one trial fewer would fit.
        slot = {_node_resource(): math.floor(10_000 / self.concurrent) / 10_000}
        trainable = ray_tune.with_resources(ray_tune.with_parameters(TrialRun, job=job), slot)
        storage = self.folder.for_tune(name)
        location = f"{storage['storage_path']}/{name}"
        if ray_tune.Tuner.can_restore(location, storage_filesystem=storage["storage_filesystem"]):
            # With this trainable: the saved one refers to objects and a channel of the driver that is gone.
            return ray_tune.Tuner.restore(
                location, trainable, storage_filesystem=storage["storage_filesystem"], resume_unfinished=True
            )
        plan = make_plan()
        return ray_tune.Tuner(
            trainable,
            param_space=plan.space,
            tune_config=ray_tune.TuneConfig(
                search_alg=plan.search,
                scheduler=plan.scheduler,
                # The grid in `param_space` has all trials already, and each sample would repeat it.
                num_samples=1 if plan.search is None else plan.trials,
                # A new process would import everything again.
                reuse_actors=True,
                time_budget_s=time_budget,
            ),
            run_config=ray_tune.RunConfig(
                **storage,
                failure_config=ray_tune.FailureConfig(max_failures=section.max_failures),
                # The runs store their checkpoints; Tune's are pointers, and none is needed of a trial that has ended.
                checkpoint_config=ray_tune.CheckpointConfig(checkpoint_at_end=False),
                callbacks=[MonitorCallback(), *(() if self.debug else (QuietProgress(),))],
                verbose=2 if self.debug else 0,
            ),
        )


def _node_resource() -> str:
    """Return the name of the Ray resource that only the driver's node has."""
    node_id = ray.get_runtime_context().get_node_id()
    resources = next(node["Resources"] for node in ray.nodes() if node["NodeID"] == node_id)
    return next(name for name in resources if name.startswith("node:") and not name.startswith("node:__"))


@contextmanager
def _quiet(debug: bool) -> Iterator[None]:
    """Silence Tune's logger unless debugging: trials report their events themselves."""
    logger = logging.getLogger("ray.tune")
    level = logger.level
    logger.setLevel(level if debug else logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
