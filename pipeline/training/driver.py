"""A run as a whole: prepare, start the workers, follow them, collect what they leave."""

from __future__ import annotations

import queue as queues
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.preflight import WorkerPlan, plan_workers
from pipeline.config import RunConfig
from pipeline.display import Display, SilentDisplay
from pipeline.errors import RunFailed, UserError
from pipeline.paths import absolute_paths
from pipeline.session import connect, node_resources
from pipeline.training.folder import RunFolder
from pipeline.training.metrics import MetricsFile

if TYPE_CHECKING:
    import pandas

    from pipeline.data import Prepared

__all__ = ["TrainResult", "train"]


@dataclass(frozen=True)
class TrainResult:
    """What a run has left."""

    run_dir: Path
    """Config, metrics, checkpoints, model."""
    steps: int
    """Optimizer steps of the run."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Last value of every metric."""

    @property
    def model_dir(self) -> Path:
        """The trained model or adapter, with its tokenizer."""
        return self.run_dir / "model"

    @cached_property
    def history(self) -> pandas.DataFrame:
        """One row per logging or evaluation step."""
        return MetricsFile(self.run_dir / "metrics.jsonl").table()


def train(cfg: RunConfig, *, resume: bool = False, display: Display | None = None, debug: bool = False) -> TrainResult:
    """Prepare the data and train on Ray; the run's files go to `output_dir`.

    Args:
        cfg: the recipe.
        resume: continue the run that `output_dir` holds; without it, such a run is refused.
        display: shows stages, steps and notes; nothing is shown when None.
        debug: let the output of the workers through.

    Raises:
        UserError: for anything that the user can mend, before workers start where it can be known then.
        RunFailed: when workers failed more often than `ray.max_failures`.
    """
    from pipeline.data import prepare
    from strategies.cadence import total_steps
    from strategies.registry import get_strategy

    get_strategy(cfg.rl)
    cfg = absolute_paths(cfg)
    _check_models(cfg)
    display = display or SilentDisplay()
    folder = RunFolder(Path(cfg.output_dir))
    display.stage("starting Ray")
    connect(cfg, debug)
    plan = plan_workers(cfg.num_workers, cfg.ray.use_gpu, cfg.worker_resources(), node_resources())
    folder.open(cfg, resume)
    display.stage("preparing data")
    prepared = prepare(cfg, progress=display.progress)
    display.note(f"prepared {prepared.train_rows} training and {prepared.eval_rows} evaluation rows: {prepared.path}")
    steps = total_steps(prepared.train_rows, cfg, plan.num_workers)
    selection = _selection(cfg, steps)
    finished = folder.finished_steps()
    if finished is not None and finished >= steps:
        display.note(f"the run has already finished with step {finished}: {folder.path}")
        return _result(folder, finished)
    return _Run(cfg, folder, prepared, steps, plan, selection, display, debug).follow()


def _check_models(cfg: RunConfig) -> None:
    """Say now what would otherwise fail in every worker."""
    from strategies.locations import resolve_model_location

    for key in ("base_model", "reference_model", "lora_model_dir"):
        if getattr(cfg, key) is not None:
            resolve_model_location(getattr(cfg, key), key)


def _selection(cfg: RunConfig, steps: int) -> dict[str, Any]:
    """What Ray needs to know to keep the best checkpoint; a cadence that contradicts itself is said here."""
    from strategies.cadence import RunLength, cadence_arguments

    arguments = cadence_arguments(cfg, RunLength(steps, steps, steps_per_epoch=None))
    if not arguments.get("load_best_model_at_end"):
        return {}
    return {
        "checkpoint_score_attribute": arguments["metric_for_best_model"],
        "checkpoint_score_order": "max" if arguments["greater_is_better"] else "min",
    }


class _Run:
    """Ray Train in a thread, the driver's display and metrics file in the foreground."""

    def __init__(
        self,
        cfg: RunConfig,
        folder: RunFolder,
        prepared: Prepared,
        steps: int,
        plan: WorkerPlan,
        selection: dict[str, Any],
        display: Display,
        debug: bool,
    ) -> None:
        from ray.util.queue import Queue

        self.cfg, self.folder, self.prepared, self.steps = cfg, folder, prepared, steps
        self.plan, self.selection, self.display, self.debug = plan, selection, display, debug
        self.metrics = MetricsFile(folder.metrics)
        self.queue = Queue(actor_options={"num_cpus": 0})
        self.outcome: Any = None

    def follow(self) -> TrainResult:
        """Wait for the run and show it."""
        plural = "s" * (self.plan.num_workers != 1)
        self.display.stage(f"starting {self.plan.num_workers} worker{plural}", total=self.steps)
        thread = threading.Thread(target=self._fit, name="ray-train", daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                self._take(self._events(wait_s=0.2))
        except KeyboardInterrupt:
            self._abandon()
            raise
        self._take(self._events(wait_s=0))
        self.queue.shutdown()
        if isinstance(self.outcome, BaseException):
            raise _explain(self.outcome, self.folder) from self.outcome
        returned = self.outcome.return_value
        self.folder.finish({"step": returned["step"], "total_steps": self.steps, "best_metric": returned["best_metric"]})
        return _result(self.folder, returned["step"])

    def _fit(self) -> None:
        try:
            self.outcome = self._trainer().fit()
        except BaseException as error:  # noqa: BLE001 - handed to the foreground, which raises it
            self.outcome = error

    def _trainer(self) -> Any:
        from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        from pipeline.training.reporting import Relay
        from pipeline.training.worker import WorkerJob, train_worker

        return TorchTrainer(
            train_worker,
            train_loop_config={"job": WorkerJob(self.cfg, self.prepared, self.steps, self.debug)},
            scaling_config=ScalingConfig(
                num_workers=self.plan.num_workers,
                use_gpu=self.plan.use_gpu,
                resources_per_worker=self.plan.resources,
            ),
            run_config=RunConfig(
                name=self.folder.path.name,
                storage_path=str(self.folder.path.parent),
                failure_config=FailureConfig(max_failures=self.cfg.ray.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=self.cfg.save_total_limit, **self.selection),
                callbacks=[Relay(self.queue)],
            ),
        )

    def _events(self, wait_s: float) -> Iterator[dict[str, Any]]:
        try:
            yield self.queue.get(block=wait_s > 0, timeout=wait_s or None)
            while True:
                yield self.queue.get(block=False)
        except (queues.Empty, _queue_empty()):
            return

    def _take(self, events: Iterator[dict[str, Any]]) -> None:
        for event in events:
            if event["event"] == "failure":
                for rank, reason in event["failures"].items():
                    self.display.note(f"worker {rank} failed: {reason}")
                continue
            if "resumed" in event:
                self.metrics.rewind(event["resumed"])
                self.display.stage("training")
                if event["resumed"]:
                    self.display.note(f"continuing from the checkpoint of step {event['resumed']}")
            self.metrics.append(event["records"])
            for record in event["records"]:
                self.display.record(record)
            if "checkpoint" in event:
                self.display.note(f"saved {event['checkpoint']}")

    def _abandon(self) -> None:
        """Stop the workers; the last complete checkpoint stays."""
        import ray

        steps = self.folder.checkpoints()
        kept = f"the checkpoint of step {steps[-1]} is complete" if steps else "no checkpoint was complete yet"
        self.display.note(f"interrupted: {kept}; continue with --resume")
        ray.shutdown()


def _queue_empty() -> type[Exception]:
    from ray.util.queue import Empty

    return Empty


def _result(folder: RunFolder, step: int) -> TrainResult:
    metrics: dict[str, float] = {}
    for record in MetricsFile(folder.metrics).read():
        metrics.update({name: value for name, value in record.items() if name not in ("step", "time")})
    return TrainResult(folder.path, step, metrics)


def _explain(error: BaseException, folder: RunFolder) -> Exception:
    """The error of a run in one message: a worker's UserError or ValueError as it is, anything else with what remains."""
    failures = getattr(error, "worker_failures", None) or {}
    causes = {rank: getattr(cause, "cause", None) or cause for rank, cause in failures.items()}
    for cause in causes.values():
        if isinstance(cause, ValueError):
            return UserError(str(cause))
    steps = folder.checkpoints()
    remains = (
        f"the checkpoint of step {steps[-1]} is complete, continue with --resume" if steps else "no checkpoint was complete yet"
    )
    what = "; ".join(f"worker {rank}: {type(cause).__name__}: {cause}".strip() for rank, cause in sorted(causes.items()))
    return RunFailed(f"training failed: {what or error} ({remains})")
