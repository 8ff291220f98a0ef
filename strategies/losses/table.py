"""Table of pair losses: function, paper, and properties of each. Loads without torch.

Config rules, documentation and tests are derived from this table; tests check its entries against the functions.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from strategies.outside import OutsideError, RegistrationError, claim, described, line_of

if TYPE_CHECKING:
    from strategies.losses.types import PairLoss

__all__ = ["F_DIVERGENCES", "LOSSES", "PAIR_LOSSES", "LossInfo", "loss_types", "register_loss"]

# The names of `scores.F_DIVERGENCES`, whose module needs torch; a test compares them.
F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


@dataclass(frozen=True)
class LossInfo:
    """One loss.

    Attributes:
        function: the loss itself, or `module.function` within this package.
        paper: empty for the plain likelihood and for external losses.
        reads: fields of `strategies.losses.LossOptions` that change its value, in one string (alpha belongs to f_divergence).
        reference: whether it needs log-probabilities of a reference.
        couples: whether the loss of a pair depends on other pairs of the batch.
        lengths: whether the loss itself averages over completion tokens.
        strategy: whether it is the loss of a separate strategy, and so no value of `dpo_loss_type`.
        target: whether it is least at a finite margin, and rises beyond.
    """

    function: str | PairLoss
    paper: str
    reads: frozenset[str]
    reference: bool = True
    couples: bool = False
    lengths: bool = False
    strategy: bool = False
    target: bool = False

    def load(self) -> PairLoss:
        """Return the function, importing its module if needed."""
        if not isinstance(self.function, str):
            return self.function
        # Looked up by name when needed, so that the table can be read without torch.
        module, name = self.function.split(".")
        return getattr(importlib.import_module(f"strategies.losses.{module}"), name)


def _loss(function: str, paper: str, reads: str, **traits: Any) -> LossInfo:
    return LossInfo(function, paper, frozenset(reads.split()), **traits)


# simpo and orpo: no reference, averaged over tokens, and chosen by `rl:`.
_ALONE: dict[str, Any] = {"reference": False, "lengths": True, "strategy": True}

LOSSES: dict[str, LossInfo] = {
    "sigmoid": _loss("logistic.sigmoid_loss", "arXiv 2305.18290", "beta label_smoothing f_divergence"),
    "hinge": _loss("regression.hinge_loss", "arXiv 2305.10425", "beta f_divergence"),
    "ipo": _loss("regression.ipo_loss", "arXiv 2310.12036", "beta f_divergence", lengths=True, target=True),
    "exo_pair": _loss("logistic.exo_pair_loss", "arXiv 2402.00856", "beta label_smoothing f_divergence"),
    "nca_pair": _loss("pointwise.nca_pair_loss", "arXiv 2402.05369", "beta"),
    "robust": _loss("logistic.robust_loss", "arXiv 2403.00409", "beta label_smoothing f_divergence"),
    "bco_pair": _loss("pointwise.bco_pair_loss", "arXiv 2404.04656", "beta"),
    "sppo_hard": _loss("regression.sppo_hard_loss", "arXiv 2405.00675", "beta", target=True),
    "aot": _loss("transport.aot_loss", "arXiv 2406.05882", "beta label_smoothing", couples=True),
    "aot_unpaired": _loss("transport.aot_unpaired_loss", "arXiv 2406.05882", "beta label_smoothing", couples=True),
    "apo_zero": _loss("pointwise.apo_zero_loss", "arXiv 2408.06266", "beta"),
    "apo_down": _loss("pointwise.apo_down_loss", "arXiv 2408.06266", "beta"),
    "discopop": _loss("logistic.discopop_loss", "arXiv 2406.08414", "beta f_divergence discopop_tau"),
    "sft": _loss("reference_free.sft_loss", "", "", reference=False, couples=True, lengths=True),
    "sigmoid_norm": _loss("logistic.sigmoid_norm_loss", "arXiv 2411.15124", "beta f_divergence", lengths=True),
    "simpo": _loss("reference_free.simpo_loss", "arXiv 2405.14734", "beta label_smoothing gamma", **_ALONE),
    "orpo": _loss("reference_free.orpo_loss", "arXiv 2403.07691", "beta", **_ALONE),
}
"""By TRL's names; `register_loss` adds others."""
_BUILT_IN = frozenset(LOSSES)
# Before any loss is registered: `reads` of those names these, and what else they read is in `LossOptions.own`.
_OPTIONS = frozenset[str]().union(*(loss.reads for loss in LOSSES.values()))


class _Functions(Mapping[str, "PairLoss"]):
    def __getitem__(self, name: str) -> PairLoss:
        # Not a dict made at import: losses are registered later, and modules are imported at the first use of one.
        return LOSSES[name].load()

    def __iter__(self) -> Iterator[str]:
        return iter(LOSSES)

    def __len__(self) -> int:
        return len(LOSSES)


PAIR_LOSSES: Mapping[str, PairLoss] = _Functions()
"""Name -> function of every loss in the table, including external ones."""


def loss_types() -> tuple[str, ...]:
    """Return the values of `dpo_loss_type`, by TRL's names."""
    return tuple(name for name, loss in LOSSES.items() if not loss.strategy)


def register_loss(
    name: str,
    function: PairLoss | None = None,
    *,
    reads: Iterable[str] = ("beta",),
    reference: bool = True,
    couples: bool = False,
    lengths: bool = False,
) -> Any:
    """Make `name` a value of `dpo_loss_type`.

    Args:
        name: of the loss.
        function: `(policy, reference, options) -> losses`, as `strategies.losses.PairLoss`: the loss of each of B pairs, shape
            (B,), to be minimised. If omitted, a decorator is returned.
        reads: fields of `strategies.losses.LossOptions` that change its value.
        reference: whether it compares the policy with a reference; else `reference` is None.
        couples: whether the loss of a pair depends on other pairs of the batch; it is then called with whole global batches.
        lengths: whether it averages over completion tokens itself.

    Raises:
        RegistrationError: for a name that is taken, or options that don't exist.
    """
    if not isinstance(name, str):
        # `@register_loss` without a call passes the function as `name`.
        raise RegistrationError(f'register_loss: expected a name, got {name!r}; write @register_loss("name")')
    if unknown := sorted(set(reads) - _OPTIONS):
        raise RegistrationError(
            f"loss {name!r}: reads names {', '.join(unknown)}, which no loss has; there are {', '.join(sorted(_OPTIONS))}"
        )

    def register(function: PairLoss) -> PairLoss:
        # `claim` compares unwrapped names, so that a notebook cell that is run again may register its function again.
        others = {known: loss.function for known, loss in LOSSES.items() if known not in _BUILT_IN}
        claim("loss", name, function, others, _BUILT_IN)
        LOSSES[name] = LossInfo(_checked(name, function), "", frozenset(reads), reference, couples, lengths)
        return function

    return register if function is None else register(function)


def _checked(name: str, function: PairLoss) -> PairLoss:
    """Wrap the function, so that errors and wrong return values are reported under the loss's name."""

    # `wraps` keeps `__wrapped__`, by which errors and `claim` find the function itself.
    @functools.wraps(function)
    def call(policy: Any, reference: Any, options: Any) -> Any:
        try:
            losses = function(policy, reference, options)
        except Exception as error:
            raise OutsideError(described(f"loss {name!r}", function, error)) from error
        # A sum over the pairs would broadcast, and count once for each of them.
        wanted, got = tuple(policy.chosen.shape), getattr(losses, "shape", None)
        if got is None or tuple(got) != wanted:
            result = type(losses).__name__ if got is None else f"shape {tuple(got)}"
            raise OutsideError(
                f"loss {name!r} ({line_of(function)}) must return the loss of each pair, shape {wanted}, got {result}"
            )
        return losses

    return call
