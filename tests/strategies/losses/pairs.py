"""Pairs to compute losses of, and the losses that TRL has too."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from trl import DPOConfig

from strategies.losses import PAIR_LOSSES, LossOptions, PairLogps

OPTIONS: dict[str, LossOptions] = {name: LossOptions(label_smoothing=0.1) for name in PAIR_LOSSES}
"""Options that every loss accepts: exo_pair needs label smoothing."""

TRL_LOSSES = frozenset(re.findall(r"'(\w+)'", DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]))

DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


def logps(
    chosen: Sequence[float],
    rejected: Sequence[float],
    chosen_lengths: Sequence[int] = (),
    rejected_lengths: Sequence[int] = (),
    *,
    dtype: torch.dtype = torch.float64,
) -> PairLogps:
    """Pairs of these summed log-probabilities, as leaves that take gradients; lengths are 5 and 7 unless given."""
    return PairLogps(
        torch.tensor(chosen, dtype=dtype, requires_grad=True),
        torch.tensor(rejected, dtype=dtype, requires_grad=True),
        torch.tensor(chosen_lengths or [5] * len(chosen)),
        torch.tensor(rejected_lengths or [7] * len(rejected)),
    )


def one_pair() -> tuple[PairLogps, PairLogps]:
    return logps([-10.0], [-14.0]), logps([-12.0], [-13.0])


def batch() -> tuple[PairLogps, PairLogps]:
    """Policy and reference of three pairs whose order by margin differs between the two."""
    lengths = ((5, 8, 4), (7, 6, 3))
    policy = logps([-10.0, -20.0, -8.0], [-14.0, -18.0, -9.0], *lengths)
    return policy, logps([-12.0, -19.0, -11.0], [-13.0, -21.0, -7.0], *lengths)


def corners(dtype: torch.dtype) -> tuple[PairLogps, PairLogps]:
    """Every combination of log-probabilities 0, -1 and -1e4, and of empty and long completions."""
    values = list(itertools.product((0.0, -1.0, -1e4), repeat=4))
    lengths = [(0, 0), (1, 1), (1, 4096), (4096, 1)]
    chosen, rejected, *reference = zip(*(value for value in values for _ in lengths), strict=True)
    sizes = tuple(zip(*(size for _ in values for size in lengths), strict=True))
    return logps(chosen, rejected, *sizes, dtype=dtype), logps(*reference, *sizes, dtype=dtype)


def swapped(pairs: PairLogps) -> PairLogps:
    return PairLogps(pairs.rejected, pairs.chosen, pairs.rejected_lengths, pairs.chosen_lengths)


def shifted(pairs: PairLogps, chosen: Tensor | float, rejected: Tensor | float) -> PairLogps:
    return replace(pairs, chosen=pairs.chosen + chosen, rejected=pairs.rejected + rejected)


def gradients(loss: Tensor, policy: PairLogps) -> tuple[Tensor, Tensor]:
    """Derivatives of the summed loss by chosen and rejected; zeros where it does not depend on them."""
    return torch.autograd.grad(loss.sum(), (policy.chosen, policy.rejected), allow_unused=True, materialize_grads=True)
