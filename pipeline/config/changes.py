"""Record of a key that was translated or left out of another tool's recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Change"]


@dataclass(frozen=True)
class Change:
    """A key that was translated or left out. `becomes` has our keys and values, none if it was left out."""

    key: str
    value: Any
    becomes: Mapping[str, Any]
    why: str

    def __str__(self) -> str:
        """Format as a note."""
        written = " and ".join(f"{name}: {_short(value)}" for name, value in self.becomes.items())
        what = f"is read as {written}" if self.becomes else "is left out"
        return f"{self.key}: {_short(self.value)} {what}: {self.why}"


def _short(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
