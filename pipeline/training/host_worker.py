"""One worker of a host inside Ray Train: it holds a base model, and trains the adapters of many runs in its slots."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train.collective import broadcast_from_rank_zero

from pipeline.config import RunConfig
from pipeline.io.remote_models import RemoteModels
from pipeline.ray.channel import NodeChannel, Outbox
from pipeline.ray.memory import out_of_memory
from pipeline.runs.scratch import remove_scratch
from pipeline.training.controller_callback import CHANNEL, REPORT, find_user_error
from pipeline.training.events import HostReady, SlotEnded, StepReport, merged
from pipeline.training.heartbeat import beat
from pipeline.training.job import WorkerJob
from pipeline.training.slot_commands import received
from pipeline.training.turn_note import TurnNote
from pipeline.training.worker import prepare_process, train_job
from pipeline.training.worker_checkpoints import WorkerCheckpoints
from strategies import slots
from strategies.models.loading import load_model
from strategies.models.tokenizer import shared_tokenizer
from strategies.slots.causes import causes

__all__ = ["HostJob", "run_host"]

IDLE_S = 1.0
"""Seconds that a host without runs waits for a command, before it gives a sign of life."""


@dataclass(frozen=True)
class HostJob:
    """Arguments of every worker of a host, from the driver."""

    cfg: RunConfig
    """Recipe of one of the runs: its base, precision and workers are those of all."""
    slots: int
    channel: NodeChannel
    """That of its driver."""
    import_path: str
    """As a `WorkerJob`'s."""
    debug: bool = False
    models: RemoteModels = field(default_factory=RemoteModels)
    """Those at URIs, as the driver has found them."""
    divided: tuple[str, ...] | None = None
    """`cluster.division.divided_layers` of the recipe."""


def run_host(job: HostJob) -> None:
    """Run one rank of a host, until its driver closes it."""
    beat()
    prepare_process(job.import_path, job.debug)
    job.models.bring(beat)
    reports = HostReports(job.channel)
    began = time.monotonic()
    base = _load_base(job)
    reports.send(job.channel, HostReady(time.monotonic() - began, base.nbytes))
    beat()
    runs: dict[str, WorkerJob] = {}
    stores: dict[str, WorkerCheckpoints] = {}

    def train(slot: Any) -> dict[str, Any]:
        run: WorkerJob = _undivided(slot.payload)
        runs[slot.name] = run
        run.models.bring(beat)
        stores[slot.name] = WorkerCheckpoints(run.location())
        deliver = partial(reports.send, run.channel)
        return train_job(run, lambda cfg, tokenizer: slot.new_model(), slot.join, deliver, stores[slot.name])

    def report_end(ended: Any) -> None:
        # In the host's thread, on every rank: a report is a barrier of them.
        if ended.error is not None and _is_of_device(ended.error):
            # After such an error the device takes no work of this process any more, also not of the others. In new processes
            # they resume, and the failure counts for this run, whose turn it was: where several compute together, `SlotHost`
            # raises it, and it is the end of no slot.
            raise ended.error
        run, checkpoints = runs.pop(ended.name), stores.pop(ended.name, None)
        event = _described(ended, has_others=bool(runs))
        if ended.error is not None and checkpoints is not None:
            # What it stores still would meet the next attempt, which deletes what is stored by half.
            checkpoints.finish()
        # A run that may begin again finds there which step it had reached.
        if ended.error is not None and not (event.has_raised and run.cfg.ray.max_failures):
            remove_scratch(run.scratch)  # in the middle of its work, it hasn't done so itself
        reports.send(run.channel, event)
        reports.send(job.channel, event)  # its driver gives the slot to the next run

    slots.SlotHost(base, train, job.slots, on_turn=reports.note_turn).run(_next_commands, report_end)
    beat(over=True)


def _load_base(job: HostJob) -> slots.SharedBase:
    model = load_model(job.cfg, shared_tokenizer(job.cfg))
    if job.divided is None:
        return slots.SharedBase(model)
    device = ray.train.torch.get_device()
    if device.type != "cpu":
        torch.accelerator.set_device_index(device)
    return slots.DividedBase(model, device.type, job.divided)


def _undivided(run: WorkerJob) -> WorkerJob:
    """Return a run whose trainer divides nothing: the host has divided the base, and the adapter is whole on every worker."""
    changes: dict[str, Any] = {"deepspeed": None, "fsdp_config": None}
    if run.cfg.fsdp_config is not None and run.cfg.fsdp_config.activation_checkpointing:
        changes["gradient_checkpointing"] = True
    return replace(run, cfg=run.cfg.model_copy(update=changes), sharding={})


class HostReports:
    """Sends what happens on a host to the drivers of its runs, from all ranks together, and notes whose turn it is.

    Ray's controller forwards one report per poll, for which the worker waits: on a host all runs would wait for each one. So
    where the first worker runs on the drivers' node, it writes to their channels itself.

    Args:
        channel: of the host's driver.
    """

    def __init__(self, channel: NodeChannel) -> None:
        context = ray.train.get_context()
        self._rank, self._ranks = context.get_world_rank(), context.get_world_size()
        self._is_direct = broadcast_from_rank_zero(channel.folder.exists() if self._rank == 0 else None)
        self._outbox = Outbox()
        self._turn = TurnNote(channel, self._is_direct)

    def note_turn(self, name: str | None) -> None:
        """Note that it is a run's turn, or that of several: if this process dies in it, they may be at fault."""
        if self._rank == 0:
            self._turn.write(name)

    def send(self, channel: NodeChannel | None, event: HostReady | StepReport | SlotEnded) -> None:
        """Send an event to a driver's channel; every rank must call it. A driver that has ended reads no more."""
        if not self._is_direct:
            ray.train.report({REPORT: event, CHANNEL: channel})
            return
        events = [event]
        if self._ranks > 1:
            events = [event] * self._ranks
            torch.distributed.all_gather_object(events, event)
        if self._rank == 0 and channel is not None:
            self._outbox.send(channel, merged(events))


def _next_commands(host: Any) -> list[Any]:
    beat()
    return received(IDLE_S if host.free == host.slots else 0.0)


def _is_of_device(error: BaseException) -> bool:
    """Return whether the device has failed: what a plugin raises in its place still has that error as cause or context."""
    return any(isinstance(one, torch.AcceleratorError) for one in causes(error))


def _described(ended: Any, has_others: bool) -> SlotEnded:
    """Return how a run has ended, without objects that only this process knows.

    Args:
        ended: what `SlotHost` says of it.
        has_others: whether other runs had slots.
    """
    if ended.error is None:
        return SlotEnded(ended.name, ended.result)
    failure = f"{type(ended.error).__name__}: {ended.error}"
    if isinstance(ended.error, slots.CantShare):
        return SlotEnded(ended.name, None, str(ended.error), try_alone=True)
    if (refusal := find_user_error({0: ended.error})) is not None:
        return SlotEnded(ended.name, None, refusal, refused=True)
    if ended.is_out_of_memory or out_of_memory(failure) is not None:
        return SlotEnded(ended.name, None, f"it ran out of memory{' beside others' * has_others}", try_alone=True)
    return SlotEnded(ended.name, None, " ".join(failure.split())[:400], has_raised=True)
