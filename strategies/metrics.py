"""Metrics as sums and counts, which can be added over forwards and ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["MetricSums", "gather_means"]

MetricSums = dict[str, tuple[Tensor, Tensor]]
"""Name -> (sum, count), scalars."""


def gather_means(accelerator: Any, sums: MetricSums) -> tuple[dict[str, float], dict[str, float]]:
    """Sum over ranks in one collective; return the means and the sums, by name.

    A metric with count 0 has no mean.
    """
    # float64, in which counts of tokens are exact.
    flat = torch.stack([value.double() for pair in sums.values() for value in pair])
    added = accelerator.gather(flat.unsqueeze(0)).sum(dim=0).tolist()
    triples = list(zip(sums, added[::2], added[1::2], strict=True))
    return {name: total / count for name, total, count in triples if count}, {name: total for name, total, _ in triples}
