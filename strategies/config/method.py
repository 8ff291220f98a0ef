"""Keys of the preference method."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat

from strategies.config.base import Keys, key

__all__ = ["MethodKeys"]


class MethodKeys(Keys):
    """`rl:` and what the strategies read; which strategy reads which key is the strategy's to say."""

    rl: str = key("The strategy that is trained: `prefray schema` and the README list them.", "dpo")
    rl_beta: PositiveFloat | None = key("beta: how far the policy may leave the reference; 0.1 when not set.")
    dpo_loss_type: list[str] | None = key("Loss, or losses to add up, by TRL's names; [sigmoid] when not set.", min_length=1)
    dpo_loss_weights: list[float] | None = key("Weight of each loss of dpo_loss_type.", min_length=1)
    dpo_label_smoothing: float | None = key(
        "Probability that a preference label is wrong. sigmoid: conservative DPO; robust: cDPO's unbiased form.",
        ge=0,
        lt=0.5,
    )
    dpo_use_weighting: bool | None = key("Weight each pair by its likelihood under the policy (WPO).")
    dpo_ld_alpha: float | None = key("Weight of the tokens beyond the shorter completion's length (LD-DPO).", ge=0, le=1)
    dpo_generate_during_eval: bool = key("Write a table of policy and reference answers at each evaluation.", False)
    disable_dropout: bool = key("Turn dropout off in policy and reference, so that their ratio is exact.", True)
    truncation_mode: Literal["keep_start", "keep_end"] = key(
        "Which end of a raw pair stays when it is longer than sequence_len (prepared rows follow excess_length_strategy).",
        "keep_start",
    )
