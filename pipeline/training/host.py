"""The driver's side of hosts: workers that hold a base model, and train the adapters of many runs in their slots.

A host is one run of Ray Train. When a worker dies, Ray Train starts all of them again, and every run resumes from its own last
checkpoint.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.environment import environment
from cluster.ray_compat import remove_orphaned_groups
from pipeline import training
from pipeline.io.remote_models import find_models
from pipeline.planning import RunPlan
from pipeline.ray.channel import NodeChannel
from pipeline.ray.session import use_own_threads
from pipeline.training.events import ControllerStarted, SlotEnded, WorkersFailed, WorkerStarted
from pipeline.training.hang_detection import HangDetector
from pipeline.training.heartbeat import beat
from pipeline.training.slot_commands import receive
from pipeline.training.slot_launch import SlotUnwanted, SlotWanted
from strategies.slots.commands import Attach, Close, Stop

__all__ = ["HostPlan", "Hosts", "host_worker"]

POLL_EVERY_S = 0.05
IDLE_S = 5.0
"""Seconds without runs after which a host frees its workers' resources."""
END_WITHIN_S = 10.0
ORPHANS_EVERY_S = 1.0
REPORTS = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1"}
"""Ray's controller forwards one report per poll, and on a host there are those of many runs."""


@dataclass(frozen=True)
class HostPlan:
    """What hosts are started with."""

    run: RunPlan
    """Of one of the runs, with the base, precision and workers of all."""
    hosts: int
    """Hosts that fit the cluster at once."""
    slots: int
    """Runs that each takes at once."""
    storage: dict[str, Any]
    """Arguments of Ray's RunConfig for a folder that all nodes reach; nothing is kept there."""
    directory: str
    """The driver's current directory."""
    debug: bool = False


def host_worker(config: dict[str, Any]) -> None:
    """Run `config["job"]` as one of Ray Train's workers. `training.run_host` imports torch, so only workers do."""
    use_own_threads()
    beat()
    training.run_host(config["job"])


class Hosts:
    """Starts hosts as runs ask for slots, gives each run a slot, and closes hosts that none needs; in a thread.

    Args:
        plan: of the hosts.
        channel: carries the requests of runs.
        note: shows a message.
    """

    def __init__(self, plan: HostPlan, channel: NodeChannel, note: Callable[[str], None]) -> None:
        self.plan, self.channel, self.note = plan, channel, note
        self.hosts: list[_Host] = []
        self._started = 0
        self._waiting: dict[str, SlotWanted] = {}
        self._error: BaseException | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="hosts", daemon=True)

    def __enter__(self) -> Hosts:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        for host in self.hosts:
            host.end()
        if self._error is not None:
            raise self._error

    def _loop(self) -> None:
        try:
            while not self._ended.wait(POLL_EVERY_S):
                self._step()
        except BaseException as error:  # noqa: BLE001 - raised in the thread that opened the hosts
            self._error = error
            # Their drivers would wait for ever.
            for wanted in (*self._waiting.values(), *(run for host in self.hosts for run in host.runs.values())):
                _put(wanted, SlotEnded(wanted.name, None, f"its host can't be run: {type(error).__name__}: {error}"))

    def _step(self) -> None:
        for request in self.channel.take():
            self._handle(request)
        for host in self.hosts:
            host.poll()
        self.hosts = [host for host in self.hosts if not host.has_ended]
        self._assign()

    def _handle(self, request: SlotWanted | SlotUnwanted) -> None:
        if isinstance(request, SlotWanted):
            self._waiting[request.name] = request
        elif (waiting := self._waiting.pop(request.name, None)) is not None:
            _put(waiting, SlotEnded(request.name, {"step": 0, "stopped": True}))
        else:
            for host in self.hosts:
                host.stop(request.name)

    def _assign(self) -> None:
        for name, wanted in list(self._waiting.items()):
            # On the host with the fewest runs; on another one, while there is room for one.
            if any(host.has_run_of(wanted) for host in self.hosts):
                continue  # an earlier attempt, whose process has died, still leaves its slot
            free = [host for host in self.hosts if host.has_room]
            host = min(free, key=lambda one: len(one.runs), default=None)
            if (host is None or host.runs) and len(self.hosts) < self.plan.hosts:
                host = self._start()
            if host is None:
                return
            del self._waiting[name]
            host.attach(wanted)

    def _start(self) -> _Host:
        host = _Host(self.plan, self._started, self.note)
        self._started += 1
        self.hosts.append(host)
        return host


class _Host:
    """One host, from its start to the end of its workers."""

    def __init__(self, plan: HostPlan, number: int, note: Callable[[str], None]) -> None:
        self.runs: dict[str, SlotWanted] = {}
        self.has_ended = False
        self._plan, self._number, self._note = plan, number, note
        self._hangs = HangDetector(plan.run.cfg.ray.hang_timeout)
        self._first: Any = None
        """Actor of the first worker, while there is one."""
        self._controller: Any = None
        self._closing = False
        self._busy_at = self._looked = time.monotonic()
        self._leaving: set[str] = set()
        """Runs that were asked to leave."""
        self._outcome: BaseException | None = None
        self._fitted = threading.Event()
        self._opened = NodeChannel.opened()
        self._channel = self._opened.__enter__()
        threading.Thread(target=self._fit, name=f"host-{number}", daemon=True).start()

    @property
    def has_room(self) -> bool:
        """Whether another run can attach."""
        return not self._closing and not self._fitted.is_set() and len(self.runs) < self._plan.slots

    def has_run_of(self, wanted: SlotWanted) -> bool:
        """Return whether a run with the same folder is here."""
        return any(run.job.cfg.output_dir == wanted.job.cfg.output_dir for run in self.runs.values())

    def attach(self, wanted: SlotWanted) -> None:
        """Give a run a slot, at once or when the workers have started."""
        self.runs[wanted.name] = wanted
        self._send(Attach(wanted.name, wanted.job))

    def stop(self, name: str) -> None:
        """Let a run leave its slot after its step, if it is here."""
        if name not in self.runs:
            return
        self._leaving.add(name)
        if self._first is None:
            self._left(name)
        else:
            self._send(Stop(name))

    def poll(self) -> None:
        """Handle what workers and controller have sent; close the host when it is idle."""
        # Before the events are read: all were sent before `fit` returned.
        is_over = self._fitted.is_set()
        for event in self._channel.take():
            self._handle(event)
        for note in self._hangs.check():
            self._note(note)
        self._stop_orphans()
        if is_over:
            self._finish()
        elif self.runs:
            self._busy_at = time.monotonic()
        elif not self._closing and self._first is not None and time.monotonic() - self._busy_at > IDLE_S:
            self._closing = True
            self._send(Close())

    def end(self) -> None:
        """End the host's workers, whatever they do."""
        self._closing = True
        if not self.runs:
            self._send(Close())
            self._fitted.wait(END_WITHIN_S)
        deadline = time.monotonic() + END_WITHIN_S
        while self._controller is None and not self._fitted.wait(POLL_EVERY_S) and time.monotonic() < deadline:
            for event in self._channel.take():  # until the starting controller has reported its handle
                self._handle(event)
        if self._controller is not None and not self._fitted.is_set():
            import ray

            self._controller.abort.remote()
            if not self._fitted.wait(END_WITHIN_S):
                ray.kill(self._controller)
                if self._fitted.wait(END_WITHIN_S):
                    remove_orphaned_groups()
        self._finish()

    def _stop_orphans(self) -> None:
        """Let runs leave whose driver has died."""
        if time.monotonic() - self._looked < ORPHANS_EVERY_S:
            return
        self._looked = time.monotonic()
        for name, wanted in list(self.runs.items()):
            if name not in self._leaving and wanted.driver.has_ended():
                self.stop(name)

    def _left(self, name: str) -> None:
        """Take a run as ended whose workers have died, or never started, while it was leaving."""
        self._leaving.discard(name)
        wanted = self.runs.pop(name)
        _put(wanted, SlotEnded(name, {"step": 0, "stopped": True}))

    def _handle(self, event: Any) -> None:
        match event:
            case ControllerStarted():
                self._controller = event.actor
            case WorkerStarted():
                self._hangs.add(event.rank, event.actor, event.node, event.pid)
                if event.rank == 0:
                    self._first = event.actor
                    # Also after a restart: each run resumes from its own last checkpoint.
                    for name, wanted in self.runs.items():
                        self._send(Attach(name, wanted.job))
            case SlotEnded():
                self.runs.pop(event.name, None)
                self._leaving.discard(event.name)
            case WorkersFailed():
                self._first = None
                self._hangs.clear()
                for name in list(self._leaving):
                    self._left(name)
                for wanted in self.runs.values():
                    _put(wanted, event)

    def _finish(self) -> None:
        self.has_ended = True
        why = "the workers of the host have ended" if self._outcome is None else " ".join(str(self._outcome).split())[:400]
        for name in list(self.runs):
            _put(self.runs.pop(name), SlotEnded(name, None, why))
        self._opened.__exit__(None, None, None)

    def _send(self, command: Any) -> None:
        """Send a command to the first worker; before it has started, what it needs to know is sent when it has."""
        if self._first is not None:
            self._first.execute.remote(receive, command)

    def _fit(self) -> None:
        try:
            with environment(REPORTS):
                self._trainer().fit()
        except BaseException as error:  # noqa: BLE001 - reported to the runs
            self._outcome = error
        self._fitted.set()

    def _trainer(self) -> Any:
        from ray.train import FailureConfig, RunConfig, ScalingConfig

        plan = self._plan
        cfg, workers = plan.run.cfg, plan.run.workers
        timeout = {"timeout_s": cfg.ddp_timeout} if cfg.ddp_timeout else {}
        models = find_models(cfg, without=("reference_model",))
        job = training.HostJob(cfg, plan.slots, self._channel, plan.directory, plan.debug, models)
        return training.ClusterTorchTrainer(
            host_worker,
            train_loop_config={"job": job},
            torch_config=training.ClusterTorchConfig(channel=self._channel, **timeout),
            scaling_config=ScalingConfig(
                num_workers=workers.num_workers, use_gpu=workers.use_gpu, resources_per_worker=workers.resources
            ),
            run_config=RunConfig(
                **{**plan.storage, "name": f"{plan.storage['name']}-{self._number}"},
                failure_config=FailureConfig(max_failures=cfg.ray.max_failures),
                callbacks=[training.ForwardEvents(self._channel)],
            ),
        )


def _put(wanted: SlotWanted, event: Any) -> None:
    """Send an event to a run's driver, if it still reads."""
    if wanted.events.folder.exists():
        wanted.events.put(event)
