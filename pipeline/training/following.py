"""Following a run: Ray Train works in a thread, its events are shown and written in the foreground."""

from __future__ import annotations

import os
import queue as queues
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.sharding import sharding_arguments
from pipeline.config import RunConfig
from pipeline.display import Display
from pipeline.errors import RunCancelled, RunFailed, RunStopped, UserError
from pipeline.memory import out_of_memory
from pipeline.training.folder import RunFolder
from pipeline.training.history import History
from pipeline.training.recorder import Recorder
from pipeline.training.stopping import RunControl, StopSignal
from pipeline.training.watching import Watch

if TYPE_CHECKING:
    from cluster.preflight import WorkerPlan
    from pipeline.data import Prepared
    from pipeline.reference import Scores
    from pipeline.tracking.tracking import Tracking

__all__ = ["RunPlan", "follow"]


RESIZE_INTERVAL_S = 15.0
"""How often an elastic run looks whether there is room for more workers; a change of their number costs a restart."""


MEMORY_ADVICE = (
    "lower micro_batch_size (and raise gradient_accumulation_steps), tokens_per_forward or sequence_len, set "
    "gradient_checkpointing: true, or divide the model: fsdp_config: {}, or deepspeed: zero3"
)
ABORT_WITHIN_S = 10.0
"""Time that Ray's controller is given to end its workers."""


@dataclass(frozen=True)
class RunPlan:
    """All that is decided before workers start."""

    cfg: RunConfig
    folder: RunFolder
    history: History
    """Where it is kept what happens."""
    prepared: Prepared
    steps: int
    """Optimizer steps of the run."""
    workers: WorkerPlan
    selection: dict[str, Any]
    """Arguments of Ray's CheckpointConfig that keep the best checkpoint; empty when none is chosen."""
    debug: bool
    tracking: Tracking
    """The run's trackers, which have begun."""
    scores: Scores | None = None
    """Log-probabilities of the reference, where they are cached."""
    control: RunControl | None = None
    """Of a run that another thread may end."""


def follow(plan: RunPlan, display: Display) -> dict[str, Any]:
    """Run Ray Train and wait for it; returns what rank 0 returned.

    Raises:
        UserError: a ValueError of a worker; RunFailed: any other end than success.
        RunStopped: after SIGTERM, when the workers have saved.
        RunCancelled: after `plan.control.cancel()`, when the workers have ended.
        KeyboardInterrupt: after the workers were stopped; the last complete checkpoint stays.
    """
    return _Follower(plan, display).wait()


class _Follower:
    def __init__(self, plan: RunPlan, display: Display) -> None:
        import ray
        from ray.util.queue import Queue
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self.plan, self.display = plan, display
        self.watch = Watch(plan.cfg.ray.hang_timeout)
        self.recorder = Recorder(plan, display, self.watch)
        # Where the driver is, so that no worker's node takes it along.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
        self.outcome: Any = None

    def wait(self) -> dict[str, Any]:
        number = self.plan.workers.num_workers
        least = self.plan.workers.min_workers
        workers = f"{number} worker{'s' * (number != 1)}" if least is None else f"{least} to {number} workers"
        self.display.stage(f"starting {workers}", total=self.plan.steps)
        thread = threading.Thread(target=self._fit, name="ray-train", daemon=True)
        thread.start()
        with StopSignal() as signal:
            try:
                self._accompany(thread, signal)
            except RunCancelled:
                self._abort(thread)
                self.queue.shutdown()
                raise
            except KeyboardInterrupt:
                self._abandon(thread)
                if signal.received:
                    raise RunStopped("stopped by SIGTERM") from None
                raise
        self.recorder.take(self._events(wait_s=0))
        self.queue.shutdown()
        if isinstance(self.outcome, BaseException):
            self.recorder.settle()
            raise _explain(self.outcome, self.plan.folder, self.watch.hung) from self.outcome
        returned = self.outcome.return_value
        self._end_early(returned)
        self.recorder.flush()
        return returned

    def _accompany(self, thread: threading.Thread, signal: StopSignal) -> None:
        """Show and write what happens until Ray Train has ended; pass a wish to stop on once."""
        asked = False
        while thread.is_alive():
            self.recorder.take(self._events(wait_s=0.2))
            if self.plan.control is not None and self.plan.control.is_cancelled:
                raise RunCancelled(f"the run in {self.plan.folder.path} was ended after step {self.recorder.step}")
            for note in (*self.watch.check(), *self.plan.tracking.notes()):
                self.display.note(note)
            if signal.received and not asked:
                asked = True
                self.display.note("SIGTERM: saving after this step; a second one stops at once")
                if not self.watch.stop():
                    raise KeyboardInterrupt  # no worker has started, so there is nothing to save

    def _end_early(self, returned: dict[str, Any]) -> None:
        """Say why a run whose workers ended well is not finished."""
        if not {"refused", "stopped"} & returned.keys():
            return
        self.recorder.settle()
        if "refused" in returned:
            raise UserError(f"{returned['refused']} ({self.plan.folder.remains(', continue with --resume')})")
        raise RunStopped(f"stopped by SIGTERM after step {returned['step']}, checkpoint complete; continue with --resume")

    def _fit(self) -> None:
        try:
            self.outcome = self._trainer().fit()
        except BaseException as error:  # noqa: BLE001 - handed to the foreground, which raises it
            self.outcome = error

    def _trainer(self) -> Any:
        from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig

        from pipeline.training.backend import ClusterTorchConfig, ClusterTorchTrainer
        from pipeline.training.relaying import Relay
        from pipeline.training.worker import WorkerJob, train_worker

        plan = self.plan
        sharding = sharding_arguments(plan.cfg)
        run = plan.folder.run_id
        job = WorkerJob(plan.cfg, plan.prepared, plan.steps, run, os.getcwd(), self.queue, sharding, plan.scores, plan.debug)
        return ClusterTorchTrainer(
            train_worker,
            train_loop_config={"job": job},
            torch_config=ClusterTorchConfig(**({"timeout_s": plan.cfg.ddp_timeout} if plan.cfg.ddp_timeout else {})),
            scaling_config=ScalingConfig(
                num_workers=plan.workers.range,
                elastic_resize_monitor_interval_s=RESIZE_INTERVAL_S,
                use_gpu=plan.workers.use_gpu,
                resources_per_worker=plan.workers.resources,
            ),
            run_config=RunConfig(
                **plan.folder.for_ray(),
                failure_config=FailureConfig(max_failures=plan.cfg.ray.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=plan.cfg.save_total_limit, **plan.selection),
                callbacks=[Relay(self.queue)],
            ),
        )

    def _events(self, wait_s: float) -> Iterator[dict[str, Any]]:
        try:
            yield self.queue.get(block=wait_s > 0, timeout=wait_s or None)
            while True:
                yield self.queue.get(block=False)
        except queues.Empty:  # Ray's own is a kind of it
            return

    def _abort(self, thread: threading.Thread) -> None:
        """End Ray's controller, which takes its workers, their placement group and what watches it along."""
        import ray

        self.recorder.take(self._events(wait_s=0))
        self.recorder.settle()
        deadline = time.monotonic() + ABORT_WITHIN_S
        while self.recorder.controller is None and thread.is_alive() and time.monotonic() < deadline:
            self.recorder.take(self._events(wait_s=0.2))  # it is just being started
        controller = self.recorder.controller
        if controller is not None and thread.is_alive():
            controller.abort.remote()
            thread.join(timeout=ABORT_WITHIN_S)
            if thread.is_alive():
                ray.kill(controller)

    def _abandon(self, thread: threading.Thread) -> None:
        """Stop the workers; the last complete checkpoint stays."""
        import ray

        self._abort(thread)
        self.display.note(f"interrupted: {self.plan.folder.remains()}; continue with --resume")
        ray.shutdown()


def _explain(error: BaseException, folder: RunFolder, hung: dict[int, str]) -> Exception:
    """The error of a run in one message: what a worker has refused as it is, anything else with what remains."""
    refusal = getattr(error, "controller_failure", None)
    if isinstance(refusal, UserError):
        return UserError(str(refusal))
    failures = getattr(error, "worker_failures", None) or {}
    what = "; ".join(hung.values()) or "; ".join(
        f"worker {rank}: {type(failure).__name__}: {failure}".strip() for rank, failure in sorted(failures.items())
    )
    if (memory := out_of_memory(f"{what} {error}")) is not None:
        what = f"{memory}; {MEMORY_ADVICE}"
    return RunFailed(f"training failed: {what or error} ({folder.remains(', continue with --resume')})")
