"""What a merge has made: printed, and as the card of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

from pipeline.io.storage import Location
from pipeline.ui.console import Printable, table_of

if TYPE_CHECKING:
    from rich.table import Table

    from strategies.merging.verification import Differences

__all__ = ["MergeResult", "write_card"]


@dataclass(frozen=True)
class MergeResult(Printable):
    """A merged model."""

    path: Location
    """Its folder: a Path, or the text of a URI."""
    tensors: int
    """Tensors of the model."""
    merged: int
    """Those of them that the adapter has changed."""
    nbytes: int
    """Size of all tensors in bytes."""
    dtype: str
    """Of the tensors, or of most of them."""
    differences: Differences | None
    """What lies between it and base + adapter; None when that wasn't looked at."""

    def __rich__(self) -> Group:
        size = f"{self.nbytes / 10**9:.2f} GB" if self.nbytes >= 10**9 else f"{self.nbytes / 10**6:.1f} MB"
        tensors = Text(f"tensors  {self.merged} of {self.tensors} changed, {size}, {self.dtype}")
        table = [] if self.differences is None else [_table(self.differences)]
        return Group(tensors, *table, Text(f"model    {self.path}"))


def _table(found: Differences) -> Table:
    gaps = {
        "log-probabilities": found.logps,
        "  what rounding explains": found.rounding,
        "  what the adapter does": found.adapter,
    }
    rows = [
        ("logits", f"{found.logits:.2g}", ""),
        *((name, f"{gap.largest:.2g}", f"{gap.rms:.2g}") for name, gap in gaps.items()),
        ("same most probable token", f"{found.same_argmax:.1%}", ""),
    ]
    return table_of(("", "largest", "rms"), rows, title=f"merged, and base + adapter, on {found.tokens} tokens")


def write_card(folder: Path, base: str, adapter: str, result: MergeResult, pictures: Mapping[str, str]) -> None:
    """Write `README.md`: what was merged into what, and how far it is from base and adapter.

    Args:
        pictures: what is done with pictures, for a model that takes them.
    """
    facts = {
        "Base model": base,
        "Adapter": adapter,
        "Tensors changed": f"{result.merged} of {result.tensors}",
        "Stored as": result.dtype,
        **pictures,
        "Compared with base and adapter": "no",
    }
    if (found := result.differences) is not None:
        facts |= {
            "Compared with base and adapter": f"{found.tokens} tokens in {found.sequences} sequences",
            "Largest difference of a logit": f"{found.logits:.2g}",
            "Largest difference of a log-probability": f"{found.logps.largest:.2g}",
            "Same most probable token": f"{found.same_argmax:.1%} of positions",
        }
    # A path says nothing to others.
    is_on_hub = base.count("/") == 1 and not Path(base).exists() and "://" not in base
    tags = [*([f"base_model: {base}"] if is_on_hub else []), "tags:", "- prefray", "- merged"]
    lines = ["---", "library_name: transformers", *tags, "---", "", f"# {Path(base).name}, merged with an adapter", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
