"""`ledger.jsonl`: which rows every optimizer step was taken on, a line per step.

What it holds is what the workers say that they ran. A driver that was lost takes with it what it had not written yet; of
those steps, which a checkpoint holds the result of, the rows follow from the batch plan and the numbers of the skipped steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from strategies.batching import BatchPlan

if TYPE_CHECKING:
    from pipeline.training.following import RunPlan

__all__ = ["batch_plan", "merge", "planned_steps"]


def merge(parts: Iterable[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The records of all ranks as one list, a record per step with the rows of all of them, sorted."""
    steps: dict[int, dict[str, Any]] = {}
    for record in (record for part in parts for record in part):
        rows = steps[record["step"]]["row_ids"] if record["step"] in steps else []
        steps[record["step"]] = {**record, "row_ids": sorted(rows + record["row_ids"])}
    return [steps[step] for step in sorted(steps)]


def batch_plan(plan: RunPlan) -> BatchPlan | None:
    """The plan that a run's global batches follow; None where another loader makes them."""
    from strategies.registry import get_strategy

    cfg = plan.cfg
    if get_strategy(cfg.rl).batch_kind != "pair":
        return None
    size = cfg.micro_batch_size * cfg.gradient_accumulation_steps * plan.workers.num_workers
    return BatchPlan(plan.prepared.train_rows, size, cfg.seed, cfg.dataloader_drop_last)


def planned_steps(plan: BatchPlan, row_ids: list[Any], steps: Iterable[int], skipped: Iterable[int]) -> list[dict[str, Any]]:
    """Records of steps (from 1) as the plan has them.

    Args:
        row_ids: of all training rows, in their order.
        skipped: steps that were left out for a loss that isn't finite.
    """
    records = []
    for step in steps:
        epoch, within = divmod(step - 1, plan.steps_per_epoch)
        marks = {"skipped": True} if step in skipped else {}
        records.append({"step": step, "row_ids": sorted(row_ids[row] for row in plan.members(epoch, within)), **marks})
    return records
