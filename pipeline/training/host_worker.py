"""One worker of a host inside Ray Train: it holds a base model, and trains the adapters of many runs in its slots."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ray.train

from pipeline.config import RunConfig
from pipeline.io.remote_models import RemoteModels
from pipeline.ray.channel import NodeChannel
from pipeline.ray.memory import out_of_memory
from pipeline.training.controller_callback import CHANNEL, REPORT, find_user_error
from pipeline.training.events import SlotEnded
from pipeline.training.heartbeat import beat
from pipeline.training.job import WorkerJob
from pipeline.training.slot_commands import received
from pipeline.training.worker import prepare_process, train_job
from strategies import slots
from strategies.models.loading import load_model
from strategies.models.tokenizer import load_tokenizer

__all__ = ["HostJob", "run_host"]

IDLE_S = 1.0
"""Seconds that a host without runs waits for a command, before it gives a sign of life."""


@dataclass(frozen=True)
class HostJob:
    """Arguments of every worker of a host, from the driver."""

    cfg: RunConfig
    """Recipe of one of the runs: its base, precision and workers are those of all."""
    slots: int
    import_path: str
    """As a `WorkerJob`'s."""
    debug: bool = False
    models: RemoteModels = field(default_factory=RemoteModels)
    """Those at URIs, as the driver has found them."""


def run_host(job: HostJob) -> None:
    """Run one rank of a host, until its driver closes it."""
    beat()
    prepare_process(job.import_path, job.debug)
    job.models.bring(beat)
    base = slots.SharedBase(load_model(job.cfg, load_tokenizer(job.cfg)))
    beat()
    channels: dict[str, NodeChannel | None] = {}

    def train(slot: Any) -> dict[str, Any]:
        run: WorkerJob = slot.payload
        channels[slot.name] = run.channel
        run.models.bring(beat)
        return train_job(run, lambda cfg, tokenizer: slot.new_model(), slot.join)

    def report_end(ended: Any) -> None:
        # In the host's thread, on every rank: a report is a barrier of them.
        ray.train.report({REPORT: _described(ended), CHANNEL: channels.pop(ended.name, None)})

    slots.SlotHost(base, train, job.slots).run(_next_commands, report_end)
    beat(over=True)


def _next_commands(host: Any) -> list[Any]:
    beat()
    return received(IDLE_S if host.free == host.slots else 0.0)


def _described(ended: Any) -> SlotEnded:
    """Return how a run has ended, without objects that only this process knows."""
    if ended.error is None:
        return SlotEnded(ended.name, ended.result)
    failure = f"{type(ended.error).__name__}: {ended.error}"
    if (refusal := find_user_error({0: ended.error})) is not None:
        return SlotEnded(ended.name, None, refusal, refused=True)
    is_out = ended.is_out_of_memory or out_of_memory(failure) is not None
    return SlotEnded(ended.name, None, " ".join(failure.split())[:400], out_of_memory=is_out)
