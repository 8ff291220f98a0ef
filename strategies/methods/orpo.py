"""`rl: orpo`: odds-ratio preference optimisation (arXiv 2403.07691): likelihood and odds ratio at once, no reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import PositiveFloat

from strategies.keys import Keys, key
from strategies.methods.base import PAIR_ARGUMENTS, PAIR_KEYS, PairStrategy, pair_arguments

__all__ = ["ORPOKeys", "ORPOStrategy"]


class ORPOKeys(Keys):
    """Keys of ORPO."""

    orpo_alpha: PositiveFloat | None = key(
        "lambda: weight of the odds-ratio term; 0.1 when not set. Another name of rl_beta.", option="beta"
    )


# config key -> field of AxolotlDPOConfig
ARGUMENTS = {
    **PAIR_ARGUMENTS,
    # TRL's name of the paper's lambda (`ORPOConfig.beta`).
    "orpo_alpha": "beta",
}


class ORPOStrategy(PairStrategy):
    """Pairs: the chosen completion's likelihood, and the odds of chosen against rejected under the policy alone."""

    rl = "orpo"
    keys = PAIR_KEYS | set(ORPOKeys.model_fields)
    requires_reference = False
    batch_kind = "pair"
    best_metric = "eval_rewards/accuracies"

    @classmethod
    def set_training_args_kwargs(cls, cfg: Any) -> dict[str, Any]:
        """Return the arguments of `AxolotlDPOConfig` that the method's keys set."""
        return {**pair_arguments(cfg, cls.keys, ARGUMENTS), "loss_type": ["orpo"]}

    @classmethod
    def find_problems(cls, cfg: Any) -> Iterator[tuple[str, str]]:
        """Yield (path, message) if both names of beta are set."""
        if cfg.orpo_alpha is not None and cfg.rl_beta is not None:
            yield "orpo_alpha", "is another name of rl_beta; keep one of them"
