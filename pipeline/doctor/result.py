"""What an examination has found, in words and as tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from pipeline.doctor.checks import Check
from pipeline.doctor.memory import Diagnosis, verdict
from pipeline.secrets import redact_text
from pipeline.ui.console import Printable, table_of

if TYPE_CHECKING:
    from rich.table import Table

    from pipeline.config import RunConfig

__all__ = ["Examination"]

MEMORY = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "reference": "reference model",
    "activations": "activations",
    "token_head": "token head",
    "buckets": "DDP's buckets",
    "process": "process",
    "rows": "rows",
}
"""Items of `strategies.memory.MemoryEstimate`, in words."""


STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red"}


@dataclass(frozen=True)
class Examination(Printable):
    """What was found."""

    checks: tuple[Check, ...]
    diagnosis: Diagnosis | None
    """Of the memory; None without a recipe."""

    @property
    def failed(self) -> bool:
        """True if something is in the way of a run."""
        return bool(self._failing()) or (self.diagnosis is not None and not self.diagnosis.fits)

    def verdict(self, cfg: RunConfig | None) -> str:
        """Return the result in words."""
        words = []
        if failing := self._failing():
            words.append(f"{len(failing)} check{'s' * (len(failing) != 1)} failed: {', '.join(failing)}")
        if self.diagnosis is not None and cfg is not None:
            words.append(verdict(cfg, self.diagnosis))
        return "; ".join(words) or "nothing is in the way"

    def __rich__(self) -> RenderableType:
        rows = [(Text(one.status, STYLES[one.status]), one.name, redact_text(one.finding)) for one in self.checks]
        columns = ("", "check", "finding")
        checks = table_of(columns, rows, title="checks", left=columns, whole=("check",))
        return checks if self.diagnosis is None else Group(checks, _memory(self.diagnosis), _room(self.diagnosis))

    def _failing(self) -> list[str]:
        return [check.name for check in self.checks if check.status == "fail"]


def _memory(found: Diagnosis) -> Table:
    items = [(MEMORY[name], _mib(size)) for name, size in found.estimate.items().items() if size]
    table = table_of(("", "MiB"), items, title="peak memory of one worker")
    table.add_section()
    table.add_row("total", _mib(found.estimate.total))
    if (measured := found.measured) is not None:
        undivided = found.estimate.undivided  # as it is measured
        off = (undivided or found.estimate.total) / measured.training - 1
        if undivided is not None:
            table.add_row("total of an undivided model", _mib(undivided))
        table.add_row("measured in training", _mib(measured.training))
        table.add_row("prediction is off by", f"{100 * off:+.0f} %")
        if measured.loading:
            table.add_row("measured in loading", _mib(measured.loading))
    return table


def _room(found: Diagnosis) -> Text:
    machine = found.room.machine
    return Text(f"{found.room.name} has {_mib(machine.total)} MiB, {_mib(machine.free)} of them free now")


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f}"
