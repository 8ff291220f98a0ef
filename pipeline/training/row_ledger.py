"""`ledger.jsonl`: the rows of every optimizer step, a line per step.

Workers report the row ids of each step. Entries that a lost driver hadn't written, of steps that are in a checkpoint, are
rebuilt from the batch plan and the numbers of the skipped steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from strategies.batch.plan import BatchPlan
from strategies.methods.registry import get_strategy

if TYPE_CHECKING:
    from pipeline.training.plan import TrainingPlan

__all__ = ["batch_plan", "planned_steps"]


def batch_plan(plan: TrainingPlan) -> BatchPlan | None:
    """Return the plan of a run's global batches; None where another loader makes them."""
    cfg = plan.cfg
    if get_strategy(cfg.rl).batch_kind != "pair":
        return None
    # `num_workers` is the most of an elastic run, which keeps that global batch with fewer.
    size = cfg.micro_batch_size * cfg.gradient_accumulation_steps * plan.workers.num_workers
    return BatchPlan(plan.train_rows, size, cfg.seed, cfg.dataloader_drop_last)


def planned_steps(plan: BatchPlan, row_ids: list[Any], steps: Iterable[int], skipped: Iterable[int]) -> list[dict[str, Any]]:
    """Rebuild the records of steps (from 1) from the plan.

    Args:
        row_ids: of all training rows, in their order.
        skipped: steps that were skipped for a loss that isn't finite.
    """
    records = []
    for step in steps:
        # Steps are counted from 1 over the whole run, the plan's batches from 0 in each epoch.
        epoch, within = divmod(step - 1, plan.steps_per_epoch)
        marks = {"skipped": True} if step in skipped else {}
        records.append({"step": step, "row_ids": sorted(row_ids[row] for row in plan.members(epoch, within)), **marks})
    return records
