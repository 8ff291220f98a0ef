"""Runs Ray Train in a thread, and handles its events in the calling thread."""

from __future__ import annotations

import os
import threading
from contextlib import nullcontext
from typing import Any

from cluster.sharding import sharding_arguments
from pipeline import training
from pipeline.errors import RunCancelled, RunFailed, RunStopped, UserError
from pipeline.io.remote_models import find_models
from pipeline.ray.channel import NodeChannel
from pipeline.ray.memory import out_of_memory
from pipeline.ray.session import use_own_threads
from pipeline.runs.folder import RunFolder
from pipeline.runs.scratch import remove_everywhere
from pipeline.training.controller import end_controller
from pipeline.training.hang_detection import HangDetector
from pipeline.training.heartbeat import beat
from pipeline.training.job import WorkerJob
from pipeline.training.plan import TrainingPlan
from pipeline.training.run_log import RunLogger
from pipeline.training.signals import SigtermHandler
from pipeline.ui.display import Display

__all__ = ["TrainingLauncher", "run_training", "worker_job"]


RESIZE_INTERVAL_S = 15.0
"""Seconds between checks of an elastic run whether more workers fit; a change of their number costs a restart."""


MEMORY_ADVICE = (
    "lower micro_batch_size (and raise gradient_accumulation_steps), tokens_per_forward or sequence_len, set "
    "gradient_checkpointing: true, or divide the model: fsdp_config: {}, or deepspeed: zero3"
)
POLL_EVERY_S = 0.1


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Run `config["job"]` as one of Ray Train's workers. `training.run_worker` imports torch, so only workers do."""
    job: WorkerJob = config["job"]
    use_own_threads()
    beat()  # before the imports of `run_worker`, which take long on a slow disk
    return training.run_worker(job)


def run_training(plan: TrainingPlan, display: Display, beside: SigtermHandler | None = None) -> dict[str, Any]:
    """Run Ray Train to its end; return rank 0's result.

    Args:
        plan, display: the run's.
        beside: set where runs train beside each other, each in a thread: the main thread's, since no other one has signals.

    Raises:
        UserError: for a ValueError of a worker; RunFailed: for any other failure.
        RunStopped: after SIGTERM, when the workers have saved.
        RunCancelled: after `plan.cancel.set()`, when the workers have ended.
        KeyboardInterrupt: after the workers were stopped; the last complete checkpoint stays.
    """
    with NodeChannel.opened() as channel:
        return TrainingLauncher(plan, display, channel, beside).run()


class TrainingLauncher:
    """Starts Ray Train's trainer, polls its events, and interrupts it.

    Args:
        plan: the run's.
        display: shows stages, records and notes.
        channel: carries the events of Ray Train's controller, which Ray starts on the driver's node.
        beside: as in `run_training`.
    """

    def __init__(
        self, plan: TrainingPlan, display: Display, channel: NodeChannel, beside: SigtermHandler | None = None
    ) -> None:
        self.plan, self.display, self.channel, self.beside = plan, display, channel, beside
        self.known = plan.folder.known()
        self.hangs = HangDetector(plan.cfg.ray.hang_timeout)
        self.log = RunLogger(plan, display, self.hangs)
        self.outcome: Any = None
        self.ended = threading.Event()

    def run(self) -> dict[str, Any]:
        import ray

        most = self.plan.workers.num_workers
        least = self.plan.workers.min_workers
        workers = f"{most} worker{'s' * (most != 1)}" if least is None else f"{least} to {most} workers"
        self.display.stage(f"starting {workers}", total=self.plan.steps)
        # In another thread, since `fit` blocks; there it also leaves SIGINT alone, whose handler it replaces in the main thread
        # and never restores.
        threading.Thread(target=self._fit, name="ray-train", daemon=True).start()
        with SigtermHandler() if self.beside is None else nullcontext(self.beside) as signal:
            try:
                self._poll(signal)
            except KeyboardInterrupt:
                self._interrupt()
                self.display.note(f"interrupted: {self.plan.folder.remains()}; continue with --resume")
                if self.beside is None:
                    # Ray frees a job's actors and placement groups with it, also those that an aborted controller has left.
                    ray.shutdown()
                if signal.received:
                    raise RunStopped("stopped by SIGTERM") from None
                raise
            except BaseException:  # workers would keep writing to a folder that this process no longer owns
                self._interrupt()
                raise
        # `_poll` may have ended before it read the last events, all of which were sent before `fit` returned.
        self.log.handle_events(self.channel.take())
        if isinstance(self.outcome, BaseException):
            self.log.flush_best_effort()
            self._remove_scratch()
            raise _explain(self.outcome, self.plan.folder, self.hangs.hung) from self.outcome
        returned = self.outcome.return_value
        if self.log.has_failed:
            self._remove_scratch()
        self._end_early(returned)
        self.log.flush()
        return returned

    def _poll(self, signal: SigtermHandler) -> None:
        """Handle events until Ray Train has ended; forward one request to stop."""
        requested = False
        while not self.ended.wait(POLL_EVERY_S):
            self.log.handle_events(self.channel.take())
            if self.plan.owner.is_lost:
                raise RunFailed(self.plan.owner.message())
            if self.plan.cancel is not None and self.plan.cancel.is_set():
                raise RunCancelled(f"the run in {self.plan.folder.path} was ended after step {self.log.step}")
            for note in (*self.hangs.check(), *self.plan.tracking.notes()):
                self.display.note(note)
            if signal.received and not requested:
                requested = True
                self.display.note("SIGTERM: saving after this step; a second one stops at once")
                if not self.hangs.stop():
                    raise KeyboardInterrupt  # no worker has started, so there is nothing to save

    def _end_early(self, returned: dict[str, Any]) -> None:
        """Raise the reason of an unfinished run whose workers ended without an error."""
        if not {"refused", "stopped"} & returned.keys():
            return
        self.log.flush_best_effort()
        if "refused" in returned:
            # Workers return a refusal instead of raising it, after which Ray Train would restart them.
            raise UserError(f"{returned['refused']} ({self.plan.folder.remains(', continue with --resume')})")
        raise RunStopped(f"stopped by SIGTERM after step {returned['step']}, checkpoint complete; continue with --resume")

    def _fit(self) -> None:
        try:
            self.outcome = self._trainer().fit()
        except BaseException as error:  # noqa: BLE001 - raised in the calling thread
            self.outcome = error
        self.ended.set()

    def _trainer(self) -> Any:
        from ray.train import FailureConfig, RunConfig, ScalingConfig

        plan = self.plan
        timeout = {"timeout_s": plan.cfg.ddp_timeout} if plan.cfg.ddp_timeout else {}
        job = worker_job(plan, self.known)
        return training.ClusterTorchTrainer(
            train_worker,
            train_loop_config={"job": job},
            torch_config=training.ClusterTorchConfig(channel=self.channel, **timeout),
            scaling_config=ScalingConfig(
                num_workers=plan.workers.range,
                elastic_resize_monitor_interval_s=RESIZE_INTERVAL_S,
                use_gpu=plan.workers.use_gpu,
                resources_per_worker=plan.workers.resources,
            ),
            run_config=RunConfig(
                # Gives workers the folder's filesystem; Ray itself stores no checkpoint there, since none is reported to it.
                **plan.folder.for_ray(),
                failure_config=FailureConfig(max_failures=plan.cfg.ray.max_failures),
                callbacks=[training.ForwardEvents(self.channel)],
            ),
        )

    def _interrupt(self) -> None:
        """End Ray's controller and its workers, and what they leave."""
        self.log.handle_events(self.channel.take())
        self.log.flush_best_effort()
        end_controller(self._controller, self.ended)
        self._remove_scratch()

    def _controller(self) -> Any:
        self.log.handle_events(self.channel.take())
        return self.log.controller

    def _remove_scratch(self) -> None:
        """Delete scratch folders that workers had no time to delete."""
        remove_everywhere(self.known["scratch"], self.log.nodes)


def worker_job(plan: TrainingPlan, known: dict[str, Any], **of_slot: Any) -> WorkerJob:
    """Return the arguments of a run's workers.

    Args:
        plan: the run's.
        known: `RunFolder.known` of its folder.
        of_slot: further fields, of a run in a slot of a host.
    """
    # Of a reference whose scores are cached, workers need no weights.
    models = find_models(plan.cfg, without=("reference_model",) if plan.scores is not None else ())
    # This process's directory: workers have one of Ray's session.
    folders = known["scratch"], known["former_scratch"], os.getcwd()
    run = plan.cfg, plan.prepared, plan.steps, known["id"]
    sharding = sharding_arguments(plan.cfg)
    return WorkerJob(*run, *folders, sharding, plan.scores, plan.debug, plan.selection, models, **of_slot)


def _explain(error: BaseException, folder: RunFolder, hung: dict[int, str]) -> Exception:
    """Return one error for a failed run: a worker's UserError unchanged, any other as RunFailed with what remains."""
    # What `ForwardEvents.after_exception` raises: Ray Train wraps it in a ControllerError.
    refusal = getattr(error, "controller_failure", None)
    if isinstance(refusal, UserError):
        return UserError(str(refusal))
    failures = getattr(error, "worker_failures", None) or {}
    # Ranks that waited for the one that hung fail as well, with errors of the broken connection.
    what = "; ".join(hung.values()) or "; ".join(
        f"worker {rank}: {type(failure).__name__}: {failure}".strip() for rank, failure in sorted(failures.items())
    )
    if (memory := out_of_memory(f"{what} {error}")) is not None:
        what = f"{memory}; {MEMORY_ADVICE}"
    return RunFailed(f"training failed: {what or error} ({folder.remains(', continue with --resume')})")
