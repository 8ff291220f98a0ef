"""Literal types shared by config, rows and trainers."""

from __future__ import annotations

from typing import Literal

__all__ = ["BatchKind", "ReferenceMode"]

BatchKind = Literal["pair", "unpaired", "prompt"]
"""Kind of a row: a preferred and a rejected answer, one labelled answer, or only a prompt."""
ReferenceMode = Literal["live", "cached"]
"""Source of the reference's log-probabilities: a model beside the policy, or the score stage's columns."""
