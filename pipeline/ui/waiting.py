"""Notes of what a command waits for, when it has shown nothing for a while."""

from __future__ import annotations

import threading
import time
import weakref
from collections import Counter
from typing import Any

from cluster.ray_compat import running_jobs
from pipeline.io.retry import waits
from pipeline.ui.display import Display

__all__ = ["SILENCE_S", "WatchedDisplay", "unmet_demand"]

SILENCE_S = 10.0
"""Seconds without output after which the reason is shown."""
SHOWN_JOBS = 3


class WatchedDisplay:
    """A display that notes once what the command waits for, when a stage has shown nothing for `SILENCE_S`.

    Training is silent during its steps, so from its first record on only registered waits (`waits`) are noted.
    """

    def __init__(self, display: Display) -> None:
        self._display = display
        self._last_shown = time.monotonic()
        self._is_training = False
        self._noted: str | None = None
        self._ended = threading.Event()
        # A display that is dropped without `close` ends its thread too; the thread itself holds only a weak reference.
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

    def show(self, table: Any) -> None:  # doesn't count as output: a sweep's table is refreshed all the time
        self._display.show(table)

    def close(self) -> None:
        self._ended.set()
        self._display.close()

    def _seen(self) -> None:
        self._last_shown, self._noted = time.monotonic(), None

    def look(self) -> None:
        """Note what the command waits for after `SILENCE_S`; each reason once."""
        last_shown = self._last_shown
        if time.monotonic() - last_shown < SILENCE_S:
            return
        reason = waits[-1] if waits else None if self._is_training else unmet_demand()
        # Something may have been shown while the cluster was asked.
        if reason is not None and reason != self._noted and last_shown == self._last_shown:
            self._noted = reason
            self._display.note(f"waiting for {reason}")


def _watch(display: weakref.ref[WatchedDisplay], ended: threading.Event) -> None:
    while not ended.wait(1.0):
        if (watched := display()) is None:
            return
        watched.look()
        # Else this frame would keep the display alive while it waits.
        del watched


def unmet_demand() -> str | None:
    """Describe this job's pending resource requests, free resources, and other jobs; None without pending requests."""
    import ray

    # A look must not start Ray.
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
    # Only this job's: other jobs on the cluster wait as well.
    groups = [group for group in demands.placement_group_demand if group.pg_id.endswith(context.get_job_id())]
    bundles: Counter[tuple[tuple[str, float], ...]] = Counter()
    for demand in groups or demands.ray_task_actor_demand:  # for single tasks and actors Ray doesn't report the job
        for request in demand.bundles_by_count:  # `_group_` marks resources within a placement group that exists
            amounts = {name: amount for name, amount in request.bundle.items() if amount and "_group_" not in name}
            bundles[tuple(sorted(amounts.items()))] += request.count
    # Requests of which nothing is left, such as within a placement group; a Counter has no error for a missing key.
    del bundles[()]
    # Places on a node that a sweep's trials share: so many of them wait for others by design.
    for bundle in [bundle for bundle in bundles if all(name.startswith("node:") for name, _ in bundle)]:
        del bundles[bundle]
    if not bundles:
        return None
    requested = " and ".join(f"{count} x {_shown(bundle)}" for bundle, count in bundles.items())
    resources = {name for bundle in bundles for name, _ in bundle}
    usage = {item.resource_name: item for item in status.cluster_resource_usage}
    free = ", ".join(f"{_free(usage.get(name))} {name}" for name in sorted(resources))
    return f"{requested}, where {free} are free{_other_jobs(context.get_job_id())}"


def _shown(bundle: tuple[tuple[str, float], ...]) -> str:
    return "{" + ", ".join(f"{name}: {amount:g}" for name, amount in bundle) + "}"


def _free(usage: Any) -> str:
    return "0 of 0" if usage is None else f"{usage.total - usage.used:g} of {usage.total:g}"


def _other_jobs(job_id: str) -> str:
    others = [job for job in running_jobs() if job["JobID"] != job_id]
    shown = [f"`{job['Entrypoint']}` (process {job['DriverPid']} on {job['DriverIPAddress']})" for job in others[:SHOWN_JOBS]]
    more = f", and {len(others) - SHOWN_JOBS} more" * (len(others) > SHOWN_JOBS)
    return f"; other jobs on the cluster: {', '.join(shown)}{more}" * bool(others)
