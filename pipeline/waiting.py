"""What a command waits for, said when it has shown nothing for a while."""

from __future__ import annotations

import threading
import time
import weakref
from collections import Counter
from typing import Any

from pipeline.display import Display
from pipeline.patience import waits

__all__ = ["SILENCE_S", "WatchedDisplay", "unmet_demand"]

SILENCE_S = 10.0
"""Seconds without a sign after which a reason is looked for."""
SHOWN_JOBS = 3


class WatchedDisplay:
    """A display that notes once what is waited for, when a stage has shown nothing for `SILENCE_S`.

    Training is silent for as long as its steps take, so from its first record on only calls that block count.
    """

    def __init__(self, display: Display) -> None:
        self._display = display
        self._sign = time.monotonic()
        self._is_training = False
        self._told: str | None = None
        self._ended = threading.Event()
        weakref.finalize(self, self._ended.set)
        threading.Thread(target=_watch, args=(weakref.ref(self), self._ended), name="waiting", daemon=True).start()

    def stage(self, name: str, total: int | None = None) -> None:
        self._seen()
        self._is_training = False
        self._display.stage(name, total)

    def progress(self, state: dict[str, Any]) -> None:
        self._seen()
        self._display.progress(state)

    def record(self, record: dict[str, Any]) -> None:
        self._seen()
        self._is_training = True
        self._display.record(record)

    def saved(self, name: str) -> None:
        self._seen()
        self._display.saved(name)

    def note(self, text: str) -> None:
        self._seen()
        self._display.note(text)

    def log(self, text: str) -> None:
        self._seen()
        self._display.log(text)

    def show(self, table: Any) -> None:  # no sign: a sweep's table is shown again and again
        self._display.show(table)

    def close(self) -> None:
        self._ended.set()
        self._display.close()

    def _seen(self) -> None:
        self._sign, self._told = time.monotonic(), None

    def look(self) -> None:
        """Note the reason of a silence that is long enough; each reason once."""
        sign = self._sign
        if time.monotonic() - sign < SILENCE_S:
            return
        reason = waits[-1] if waits else None if self._is_training else unmet_demand()
        if reason is not None and reason != self._told and sign == self._sign:
            self._told = reason
            self._display.note(f"waiting for {reason}")


def _watch(display: weakref.ref[WatchedDisplay], ended: threading.Event) -> None:
    while not ended.wait(1.0):
        if (watched := display()) is None:
            return
        watched.look()
        del watched


def unmet_demand() -> str | None:
    """What of this job Ray can't place now, how much is free, and which other jobs there are; None without such a demand."""
    import ray

    if not ray.is_initialized():
        return None
    from ray.autoscaler.v2.sdk import get_cluster_status
    from ray.exceptions import RayError

    try:
        context = ray.get_runtime_context()
        status = get_cluster_status(context.gcs_address)
    except (RayError, RuntimeError, ConnectionError):  # Ray has ended meanwhile, or its head is away
        return None
    demands = status.resource_demands
    groups = [group for group in demands.placement_group_demand if group.pg_id.endswith(context.get_job_id())]
    bundles: Counter[tuple[tuple[str, float], ...]] = Counter()
    for demand in groups or demands.ray_task_actor_demand:  # of a single task or actor Ray doesn't say whose it is
        for request in demand.bundles_by_count:
            amounts = {name: amount for name, amount in request.bundle.items() if amount and "_group_" not in name}
            bundles[tuple(sorted(amounts.items()))] += request.count
    del bundles[()]
    if not bundles:
        return None
    asked = " and ".join(f"{count} x {_shown(bundle)}" for bundle, count in bundles.items())
    wanted = {name for bundle in bundles for name, _ in bundle}
    usage = {one.resource_name: one for one in status.cluster_resource_usage}
    free = ", ".join(f"{_free(usage.get(name))} {name}" for name in sorted(wanted))
    return f"{asked}, where {free} are free{_other_jobs(context.get_job_id())}"


def _shown(bundle: tuple[tuple[str, float], ...]) -> str:
    return "{" + ", ".join(f"{name}: {amount:g}" for name, amount in bundle) + "}"


def _free(usage: Any) -> str:
    return "0 of 0" if usage is None else f"{usage.total - usage.used:g} of {usage.total:g}"


def _other_jobs(own: str) -> str:
    from ray._private.state import jobs  # no public way without a dashboard

    others = [job for job in jobs() if not job["IsDead"] and job["JobID"] != own and "_ray_internal" not in job["Entrypoint"]]
    shown = [f"`{job['Entrypoint']}` (process {job['DriverPid']} on {job['DriverIPAddress']})" for job in others[:SHOWN_JOBS]]
    more = f", and {len(others) - SHOWN_JOBS} more" * (len(others) > SHOWN_JOBS)
    return f"; other jobs on the cluster: {', '.join(shown)}{more}" * bool(others)
