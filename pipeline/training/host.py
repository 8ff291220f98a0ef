"""The driver's side of hosts: which run gets a slot of which host, and when hosts start.

A host is one run of Ray Train, whose workers hold a base model and train the adapters of many runs: `one_host.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from pipeline.ray.channel import NodeChannel, Outbox
from pipeline.training.events import SlotEnded
from pipeline.training.hosted_run import HostedRun
from pipeline.training.one_host import POLL_EVERY_S, Host, HostPlan, HostStart, host_worker
from pipeline.training.slot_launch import SlotLeft, SlotUnwanted, SlotWanted

__all__ = ["HostPlan", "HostStart", "Hosts", "host_worker"]


class Hosts:
    """Starts hosts, at first all of them, gives each run a slot, and closes hosts that none needs; in a thread.

    Args:
        plan: of the hosts.
        channel: carries the requests of runs.
        note: shows a message.

    Attributes:
        starts: those of all hosts so far.
    """

    def __init__(self, plan: HostPlan, channel: NodeChannel, note: Callable[[str], None]) -> None:
        self.plan, self.channel, self.note = plan, channel, note
        self.starts: list[HostStart] = []
        self.hosts: list[Host] = []
        self._outbox = Outbox()
        self._started = 0
        self._take_turns = False
        """Whether new hosts do, after one that did and has died."""
        self._waiting: dict[str, HostedRun] = {}
        self._error: BaseException | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="hosts", daemon=True)

    def __enter__(self) -> Hosts:
        # Not only when runs ask: the workers start and load the base while the runs' own processes start.
        for _ in range(self.plan.hosts):
            self._start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        for host in self.hosts:
            host.end()
        self.check()

    def check(self) -> None:
        """Raise the error by which no host can be run any more, if there is one and it wasn't raised before."""
        if (error := self._error) is not None:
            self._error = None
            raise error

    def _loop(self) -> None:
        try:
            while not self._ended.wait(POLL_EVERY_S):
                self._step()
        except BaseException as error:  # noqa: BLE001 - raised in the thread that opened the hosts
            self._error = error
            self._refuse_all(f"its host can't be run: {type(error).__name__}: {error}")

    def _step(self) -> None:
        for request in self.channel.take():
            self._handle(request)
        for host in self.hosts:
            host.poll()
        # A host that dies again and again while several compute together would never end.
        self._take_turns = self._take_turns or any(host.has_ended and host.takes_turns and host.returned for host in self.hosts)
        returned = [run for host in self.hosts if host.has_ended for run in host.returned]
        self._waiting = {**{run.name: run for run in returned}, **self._waiting}
        self.hosts = [host for host in self.hosts if not host.has_ended]
        self._assign()
        self._outbox.flush()

    def _refuse_all(self, why: str) -> None:
        """End all runs, and until the end each that asks for a slot: their drivers would wait for ever."""
        runs: Iterable[SlotWanted] = [
            *(run.wanted for run in self._waiting.values()),
            *(run.wanted for host in self.hosts for run in host.runs.values()),
        ]
        while True:
            for wanted in runs:
                self._outbox.send(wanted.events, SlotEnded(wanted.name, None, why))
            if self._ended.wait(POLL_EVERY_S):
                return
            runs = [request for request in self.channel.take() if isinstance(request, SlotWanted)]

    def _handle(self, request: SlotWanted | SlotUnwanted | SlotLeft) -> None:
        if isinstance(request, SlotWanted):
            self._waiting[request.name] = HostedRun(request, request.failures)
        elif isinstance(request, SlotLeft):
            self._waiting.pop(request.name, None)  # after its host has died
            for host in self.hosts:
                host.release(request.name)
        elif (run := self._waiting.pop(request.name, None)) is not None:
            self._outbox.send(run.wanted.events, SlotEnded(run.name, {"step": 0, "stopped": True}))
        else:
            for host in self.hosts:
                host.stop(request.name)

    def _assign(self) -> None:
        for name, run in list(self._waiting.items()):
            if run.is_abandoned:
                del self._waiting[name]
                continue
            # On the host with the fewest runs; on another one, while there is room for one.
            if any(other.folder == run.folder for host in self.hosts for other in host.runs.values()):
                continue  # an earlier attempt, whose process has died, still leaves its slot
            free = [host for host in self.hosts if host.has_room]
            host = min(free, key=lambda one: len(one.runs), default=None)
            if (host is None or host.runs) and len(self.hosts) < self.plan.hosts:
                host = self._start()
            if host is None:
                return
            del self._waiting[name]
            host.attach(run)

    def _start(self) -> Host:
        host = Host(self.plan, self._started, self.note, self._outbox, self.starts, self._take_turns)
        self._started += 1
        self.hosts.append(host)
        return host
