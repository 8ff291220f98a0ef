"""`rl: simpo`: simple preference optimisation (arXiv 2405.14734): average log-probabilities, a margin, no reference."""

from __future__ import annotations

from typing import Any

from strategies.keys import Keys, key
from strategies.methods.base import PAIR_ARGUMENTS, PAIR_KEYS, PairStrategy, pair_arguments

__all__ = ["SimPOKeys", "SimPOStrategy"]

BETA = 2.0
"""Scale of the reward when `rl_beta` is not set: the paper's; TRL's 0.1 for CPO would leave almost no gradient."""


class SimPOKeys(Keys):
    """Keys of SimPO, and of CPO-SimPO, which adds a likelihood term."""

    simpo_gamma: float | None = key("gamma: target margin of the rewards; 0.5 when not set.", option="gamma", ge=0)
    cpo_alpha: float | None = key(
        "Weight of the chosen completion's negative log-likelihood per token (CPO-SimPO); 0, which is SimPO, when not set.",
        ge=0,
    )


# config key -> field of AxolotlDPOConfig
ARGUMENTS = {
    **PAIR_ARGUMENTS,
    "simpo_gamma": "simpo_gamma",
    "cpo_alpha": "nll_alpha",
}


class SimPOStrategy(PairStrategy):
    """Pairs, compared by their average log-probability under the policy alone."""

    rl = "simpo"
    keys = PAIR_KEYS | set(SimPOKeys.model_fields)
    requires_reference = False
    batch_kind = "pair"
    best_metric = "eval_rewards/accuracies"

    @classmethod
    def set_training_args_kwargs(cls, cfg: Any) -> dict[str, Any]:
        """Return the arguments of `AxolotlDPOConfig` that the method's keys set."""
        return {"beta": BETA, **pair_arguments(cfg, cls.keys, ARGUMENTS), "loss_type": ["simpo"]}
