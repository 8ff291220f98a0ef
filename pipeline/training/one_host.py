"""One host: a run of Ray Train whose workers hold a base model, and train the adapters of many runs in their slots."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from cluster.division import divided_layers
from cluster.environment import environment
from cluster.ray_compat import remove_orphaned_groups
from pipeline import training
from pipeline.errors import UserError
from pipeline.io.remote_models import find_models
from pipeline.planning import RunPlan
from pipeline.ray.channel import NodeChannel, Outbox
from pipeline.ray.memory import out_of_memory
from pipeline.ray.session import use_own_threads
from pipeline.runs.scratch import remove_everywhere
from pipeline.training.controller import END_WITHIN_S, end_controller
from pipeline.training.events import ControllerStarted, HostReady, SlotEnded, SlotGiven, WorkersFailed, WorkerStarted
from pipeline.training.hang_detection import HangDetector
from pipeline.training.heartbeat import beat
from pipeline.training.host_failures import judge
from pipeline.training.hosted_run import HostedRun
from pipeline.training.launch import MEMORY_ADVICE
from pipeline.training.slot_commands import receive
from pipeline.training.turn_note import SEVERAL, TurnNote
from strategies.slots.commands import Attach, Close, Stop, TakeTurns

__all__ = ["POLL_EVERY_S", "Host", "HostPlan", "HostStart", "host_worker"]

POLL_EVERY_S = 0.02
IDLE_S = 5.0
"""`HostPlan.idle_s` where no pause between runs is expected."""
FIRST_WITHIN_S = 60.0
"""The same before a host's first run."""
ORPHANS_EVERY_S = 1.0
TOGETHER = "several runs computed together"
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
    idle_s: float = IDLE_S
    """Seconds without runs after which a host frees its workers' resources."""


@dataclass(frozen=True)
class HostStart:
    """The start of a host's workers, the first one or after a failure."""

    host: int
    """The host's number, from 0."""
    seconds: float
    """Until the base was loaded: placing and starting the workers, imports, loading."""
    load_seconds: float
    """Of these, for loading."""
    base_bytes: int
    """Of a worker's copy, or part."""


def host_worker(config: dict[str, Any]) -> None:
    """Run `config["job"]` as one of Ray Train's workers. `training.run_host` imports torch, so only workers do."""
    use_own_threads()
    beat()
    training.run_host(config["job"])


class Host:
    """One host, from its start to the end of its workers.

    Ray Train starts workers that died again, as often as they do, and every run resumes from its own last checkpoint. A failure
    counts for the run whose turn it was, and for all where none had a turn yet. Where several computed together it counts for
    none, and they take turns of whole steps from then on: the next failure has a name. A run with more failures than its
    `ray.max_failures` leaves: it is tried alone where others were beside it, and has failed where none was.

    Args:
        plan: of all hosts.
        number: of this one.
        note: shows a message.
        outbox: sends the runs' events.
        starts: to which those of its workers are added.
        takes_turns: whether its runs take turns of whole steps from the beginning.

    Attributes:
        runs: by name.
        returned: runs of a host that has ended by itself, which want another one.
        takes_turns: whether its runs take turns of whole steps, and never compute together.
    """

    def __init__(
        self,
        plan: HostPlan,
        number: int,
        note: Callable[[str], None],
        outbox: Outbox,
        starts: list[HostStart],
        takes_turns: bool = False,
    ) -> None:
        self.runs: dict[str, HostedRun] = {}
        self.returned: list[HostedRun] = []
        self.has_ended = False
        self.takes_turns = takes_turns
        self._plan, self._number, self._note, self._outbox, self._starts = plan, number, note, outbox, starts
        self._starting_since = time.monotonic()
        self._slots = plan.slots
        self._hangs = HangDetector(plan.run.cfg.ray.hang_timeout)
        self._workers: dict[int, WorkerStarted] = {}
        """By rank, those of the current attempt."""
        self._nodes: set[str] = set()
        """Ray's ids of the nodes of all attempts."""
        self._controller: Any = None
        self._closing = self._is_used = False
        self._ending: threading.Thread | None = None
        self._busy_at = self._looked = time.monotonic()
        self._cleaners: list[threading.Thread] = []
        self._outcome: BaseException | None = None
        self._fitted = threading.Event()
        self._opened = NodeChannel.opened()
        self._channel = self._opened.__enter__()
        self._turn = TurnNote(self._channel, is_here=True)
        threading.Thread(target=self._fit, name=f"host-{number}", daemon=True).start()

    @property
    def has_room(self) -> bool:
        """Whether another run can attach."""
        return not self._closing and not self._fitted.is_set() and len(self.runs) < self._slots

    def attach(self, run: HostedRun) -> None:
        """Give a run a slot, at once or when the workers have started."""
        self.runs[run.name], self._is_used = run, True
        self._outbox.send(run.wanted.events, SlotGiven(self._number))
        for started in self._workers.values():
            self._outbox.send(run.wanted.events, replace(started, actor=None))
        self._send(Attach(run.name, run.wanted.job))

    def stop(self, name: str) -> None:
        """Let a run leave its slot after its step, if it is here."""
        if name not in self.runs:
            return
        self.runs[name].is_leaving = True
        if 0 in self._workers:
            self._send(Stop(name))
        else:
            self._end_run(name, SlotEnded(name, {"step": 0, "stopped": True}))

    def release(self, name: str) -> None:
        """Free the slot of a run that has left it, if it is here."""
        run = self.runs.pop(name, None)
        if run is not None and run.wanted.driver.has_ended():
            shutil.rmtree(run.wanted.events.folder, ignore_errors=True)

    def poll(self) -> None:
        """Handle what workers and controller have sent; close the host when it is idle."""
        # Before the events are read: all were sent before `fit` returned.
        is_over = self._fitted.is_set()
        # Ended runs first: a worker that has died since is not at fault for them.
        for event in sorted(self._channel.take(), key=lambda event: not isinstance(event, SlotEnded)):
            self._handle(event)
        for note in self._hangs.check():
            self._note(note)
        self._stop_orphans()
        if is_over:
            self._finish()
        elif self.runs:
            self._busy_at = time.monotonic()
        elif time.monotonic() - self._busy_at > (self._plan.idle_s if self._is_used else FIRST_WITHIN_S):
            self._close()

    def end(self) -> None:
        """End the host's workers, whatever they do."""
        if not self.runs and 0 in self._workers:
            self._close()
            self._fitted.wait(END_WITHIN_S)
        self._closing = True
        end_controller(self._find_controller, self._fitted)
        self._finish()
        for cleaner in self._cleaners:
            cleaner.join(END_WITHIN_S)

    def _find_controller(self) -> Any:
        """Return the controller's actor; None until the starting controller has reported it."""
        for event in self._channel.take():
            self._handle(event)
        return self._controller

    def _close(self) -> None:
        """Let workers without runs end. Those that haven't started, or fail again and again, are given up."""
        if not self._closing and 0 in self._workers:
            self._closing = True
            self._send(Close())
        elif self._ending is None and 0 not in self._workers and self._controller is not None:
            self._closing = True
            # In a thread: a controller that blocks takes its time.
            self._ending = threading.Thread(target=end_controller, args=(lambda: self._controller, self._fitted), daemon=True)
            self._ending.start()

    def _stop_orphans(self) -> None:
        """Let runs leave whose events no process handles any more."""
        if time.monotonic() - self._looked < ORPHANS_EVERY_S:
            return
        self._looked = time.monotonic()
        for run in list(self.runs.values()):
            if not run.is_leaving and run.is_abandoned:
                self.stop(run.name)

    def _handle(self, event: Any) -> None:
        match event:
            case ControllerStarted():
                self._controller = event.actor
            case WorkerStarted():
                self._begin(event)
            case HostReady():
                self._busy_at = time.monotonic()
                seconds = self._busy_at - self._starting_since
                self._starts.append(HostStart(self._number, seconds, event.load_seconds, event.base_bytes))
            case SlotEnded():
                # The worker has sent it to the run itself, and keeps what a next attempt needs: there may be none.
                if event.has_raised and event.name in self.runs:
                    self._clean(self.runs[event.name])
                self.release(event.name)
            case WorkersFailed():
                self._fail(event)

    def _begin(self, event: WorkerStarted) -> None:
        self._hangs.add(event.rank, event.actor, event.node, event.pid)
        self._workers[event.rank] = event
        self._nodes.add(event.node_id)
        if event.rank == 0 and self.takes_turns:
            self._send(TakeTurns())
        if event.rank == 0 and self._closing:
            self._send(Close())
        for run in list(self.runs.values()):
            if event.rank == 0 and run.is_abandoned:
                # No process would read what it reports, and another attempt may be in its folder already.
                self._end_run(run.name, SlotEnded(run.name, {"step": 0, "stopped": True}))
                continue
            # By it the run knows the nodes; the workers themselves are watched here.
            self._outbox.send(run.wanted.events, replace(event, actor=None))
            if event.rank == 0:
                # Also after a restart: each run resumes from its own last checkpoint.
                self._send(Attach(run.name, run.wanted.job))

    def _fail(self, event: WorkersFailed) -> None:
        """Count a failure of the workers, and end runs with too many of them."""
        failures = {rank: self._hangs.hung.get(rank, why) for rank, why in event.failures.items()}
        self._workers, self._starting_since = {}, time.monotonic()
        self._hangs.clear()
        memory = out_of_memory(" ".join(failures.values()))
        why = f"{memory}; {MEMORY_ADVICE}" if memory else "; ".join(f"worker {rank}: {why}" for rank, why in failures.items())
        runs = list(self.runs.values())
        turn = self._turn.take()
        judged = judge(
            {run.name: run.restarts for run in runs},
            turn,
            lacked_memory=memory is not None,
            took_turns=self.takes_turns,
            leaving=[run.name for run in runs if run.is_leaving],
        )
        if judged.takes_turns and not self.takes_turns:
            self._note(f"host {self._number}: {TOGETHER} when its workers died; from now on they take turns")
        self.takes_turns = judged.takes_turns
        if memory is not None and judged.alone:
            # As many as stay have found room.
            self._slots = max(1, len(runs) - 1)
        when = "while several runs computed together" if turn == SEVERAL else "in its turn"
        for run in runs:
            spared = "it was to leave" if run.is_leaving else TOGETHER if turn == SEVERAL else "it was another run's turn"
            spared *= run.name not in judged.counted
            run.failures += not spared
            self._outbox.send(run.wanted.events, replace(event, failures=failures, spared=spared))
            if run.is_leaving:
                self._end_run(run.name, SlotEnded(run.name, {"step": 0, "stopped": True}))
            elif run.name in judged.alone:
                self._end_run(run.name, SlotEnded(run.name, None, f"the workers that it shared died {when}", try_alone=True))
            elif run.name in judged.failed:
                self._end_run(run.name, SlotEnded(run.name, None, why))

    def _clean(self, run: HostedRun) -> None:
        """Remove a run's scratch folders where no driver does it. In a thread: nodes may take long to answer."""
        if run.is_abandoned and self._nodes:
            cleaner = threading.Thread(target=remove_everywhere, args=(run.scratch, set(self._nodes)), daemon=True)
            self._cleaners.append(cleaner)
            cleaner.start()

    def _end_run(self, name: str, ended: SlotEnded) -> None:
        """Take a run as ended whose workers have died, or never started."""
        run = self.runs[name]
        self._clean(run)
        self.release(name)
        self._outbox.send(run.wanted.events, ended)

    def _finish(self) -> None:
        """Handle the end of `fit`: runs that are still here get another host, where this one has died."""
        self.has_ended = True
        error = self._outcome
        if error is not None:
            # Those of a controller that has died keep the workers' resources.
            remove_orphaned_groups()
        why = "the workers of the host have ended" if error is None else " ".join(str(error).split())[:400]
        refusal = _refusal(error)
        if error is not None and not self._closing and refusal is None:
            self._fail(WorkersFailed({0: why}, [], time.time()))
            self.returned = list(self.runs.values())
            self.runs = {}
        for name in list(self.runs):
            self._end_run(name, SlotEnded(name, None, refusal or why, refused=refusal is not None))
        self._opened.__exit__(None, None, None)

    def _send(self, command: Any) -> None:
        """Send a command to the first worker; before it has started, what it needs to know is sent when it has."""
        if 0 in self._workers:
            self._workers[0].actor.execute.remote(receive, command)

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
        job = training.HostJob(cfg, plan.slots, self._channel, plan.directory, plan.debug, models, divided_layers(cfg))
        return training.ClusterTorchTrainer(
            host_worker,
            train_loop_config={"job": job},
            torch_config=training.ClusterTorchConfig(channel=self._channel, **timeout),
            scaling_config=ScalingConfig(
                num_workers=workers.num_workers, use_gpu=workers.use_gpu, resources_per_worker=workers.resources
            ),
            run_config=RunConfig(
                **{**plan.storage, "name": f"{plan.storage['name']}-{self._number}"},
                # Without a limit: each run has its own, and workers without runs are given up.
                failure_config=FailureConfig(max_failures=-1),
                callbacks=[training.ForwardEvents(self._channel)],
            ),
        )


def _refusal(error: BaseException | None) -> str | None:
    """Return why a host refused its input, which another try wouldn't change; None for other errors."""
    failure = getattr(error, "controller_failure", error)
    return str(failure) if isinstance(failure, UserError) else None
