"""The result of one check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Check", "Status"]

Status = Literal["pass", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """The result of a check; `finding` also states what to do where it isn't `pass`."""

    name: str
    status: Status
    finding: str
