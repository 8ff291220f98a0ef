"""What the rules look at: a run's records, its recipe, its rows, and the reference's scores of some of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.data.store import EVAL, MANIFEST, TRAIN, open_store, prepared_root
from pipeline.errors import UserError
from pipeline.findings.curves import Curves
from pipeline.io.retry import STORAGE_ERRORS
from pipeline.io.storage import Folder
from pipeline.reference.score_files import LOGPS
from pipeline.runs.folder import LEDGER, RunFolder
from strategies.losses.table import LOSSES
from strategies.methods.dpo import DPOStrategy
from strategies.methods.registry import get_strategy

if TYPE_CHECKING:
    import pyarrow as pa

    from pipeline.config import RunConfig
    from pipeline.data import Prepared
    from strategies.methods.base import Strategy

__all__ = ["ReferenceGap", "RowCounts", "RunFacts", "read_facts"]

LOOKED_AT = 4000
"""Most rows that are read to count prompts and to compare the reference's scores, so that findings cost no time."""


@dataclass(frozen=True)
class RowCounts:
    """Numbers of rows of a run."""

    train: int
    evaluation: int
    looked_at: int
    """Training rows whose prompts were compared."""
    prompts: int
    """Distinct prompts among them."""


@dataclass(frozen=True)
class ReferenceGap:
    """How the reference ranks the pairs, by log-probability per token."""

    pairs: int
    right: int
    """Pairs whose chosen answer it prefers."""
    gap: float
    """Mean of chosen minus rejected, in nats per token."""


@dataclass(frozen=True)
class RunFacts:
    """All that rules may look at."""

    cfg: RunConfig
    curves: Curves
    setup: dict[str, Any]
    """Device, dtypes and packing of a worker; empty if no worker has trained."""
    rows: RowCounts | None
    """None if the prepared rows aren't here."""
    gap: ReferenceGap | None
    """None without cached scores."""
    rows_of: Callable[[Iterable[int] | None], dict[int, list[str]]] = lambda steps: {}
    """Returns the row ids of steps, by step; with None, of the skipped ones."""
    is_finished: bool = True

    @property
    def strategy(self) -> type[Strategy]:
        """The strategy of `rl`."""
        return get_strategy(self.cfg.rl)

    @property
    def compares(self) -> bool:
        """Whether rewards are beta times log(policy / reference), of whole answers."""
        has_reference = self.strategy.batch_kind != "prompt" and self.strategy.uses_reference(self.cfg)
        return has_reference and not getattr(self.cfg, "dpo_norm_loss", None)

    @property
    def has_fixed_start(self) -> bool:
        """Whether the loss of pairs starts at a value that doesn't depend on them, such as ln 2, with nothing added."""
        cfg = self.cfg
        losses = self.strategy.losses(cfg) if issubclass(self.strategy, DPOStrategy) else []
        varies = cfg.rpo_alpha or cfg.dpo_use_weighting or not all(LOSSES[name].reference for name in losses)
        return self.compares and self.strategy.batch_kind == "pair" and not varies

    @property
    def has_target(self) -> bool:
        """Whether the loss of pairs asks for a finite margin, and not for an ever larger one."""
        losses = self.strategy.losses(self.cfg) if issubclass(self.strategy, DPOStrategy) else []
        return bool(losses) and (bool(self.cfg.dpo_label_smoothing) or all(LOSSES[name].target for name in losses))

    @property
    def beta(self) -> float:
        """Scale of the rewards."""
        return self.strategy.reward_scale(self.cfg)


def read_facts(folder: RunFolder, cfg: RunConfig, state: dict[str, Any], records: list[dict[str, Any]]) -> RunFacts:
    """Read what rules look at; what is missing or can't be read is None.

    Args:
        folder, cfg: of the run.
        state: its `run.json`.
        records: its `metrics.jsonl`, sorted by step.
    """
    events = [event for event in state.get("events", []) if event.get("event") == "training"]
    root = _optional(lambda: prepared_root(cfg.dataset_prepared_path))
    store = _optional(lambda: open_store(root.subfolder(str(state.get("prepared"))), verify=False)) if root else None
    scores = root.subfolder(f"reference/{state['scores']}") if root and state.get("scores") else None
    return RunFacts(
        cfg=cfg,
        curves=Curves(records),
        setup=events[-1].get("setup") or {} if events else {},
        rows=_optional(lambda: _count(store)) if store is not None else None,
        gap=_optional(lambda: _compare(scores)) if scores is not None else None,
        rows_of=lambda steps: _optional(lambda: _rows_of(folder.storage.read(LEDGER) or "", steps)) or {},
        is_finished=state.get("status") == "finished",
    )


def _optional(read: Callable[[], Any]) -> Any:
    """Return what `read` returns, or None when the files are missing or broken: findings never fail a run."""
    try:
        return read()
    except (UserError, *STORAGE_ERRORS, ValueError, KeyError):
        return None


def _count(store: Prepared) -> RowCounts:
    import pyarrow.compute as pc

    prompts = _first_rows(store.folder, store.parts(TRAIN), ["prompt"])["prompt"]
    # The same question about many pictures is many prompts.
    distinct = len(prompts) if store.manifest.get("pictures") else pc.count_distinct(prompts).as_py()
    return RowCounts(store.rows(TRAIN), store.rows(EVAL), len(prompts), distinct)


def _compare(folder: Folder) -> ReferenceGap | None:
    """Compare the scores of the first training pairs; None for other rows than pairs."""
    files = [entry["file"] for entry in json.loads(folder.read_bytes(MANIFEST))["files"]]
    table = _first_rows(folder, [file for file in files if file.startswith(f"{TRAIN}/")], list(LOGPS))
    chosen, rejected = (_means(table[name]) for name in LOGPS)
    gaps = chosen - rejected
    gaps = gaps[np.isfinite(gaps)]
    return ReferenceGap(len(gaps), int((gaps > 0).sum()), float(gaps.mean())) if len(gaps) else None


def _means(column: pa.ChunkedArray) -> Any:
    """Return the mean of each list, shape (rows,); NaN for an empty one."""
    import pyarrow.compute as pc

    lengths = pc.list_value_length(column).to_numpy()
    sums = np.cumsum([0.0, *column.combine_chunks().flatten().to_numpy().astype(np.float64)])
    ends = np.cumsum(lengths)
    with np.errstate(invalid="ignore"):
        return (sums[ends] - sums[ends - lengths]) / lengths


def _first_rows(folder: Folder, parts: list[str], columns: list[str]) -> pa.Table:
    import pyarrow as pa

    tables, missing = [], LOOKED_AT
    for part in parts:
        tables.append(folder.read_table(part, columns).slice(0, missing))
        missing -= len(tables[-1])
        if missing <= 0:
            break
    return pa.concat_tables(tables)


def _rows_of(ledger: str, steps: Iterable[int] | None) -> dict[int, list[str]]:
    """Parse the ledger's lines of these steps alone: it may have a hundred rows for each of many thousand steps."""
    found, wanted = {}, None if steps is None else set(steps)
    for match in re.finditer(r'^\{"step": (\d+),.*$', ledger, re.MULTILINE):
        step = int(match[1])
        if step in wanted if wanted is not None else '"skipped": true' in match[0]:
            found[step] = [str(row) for row in json.loads(match[0])["row_ids"]]
    return found
