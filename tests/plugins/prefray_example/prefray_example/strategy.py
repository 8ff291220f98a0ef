"""`rl: offset_dpo`: DPO with the loss `offset`, and a key that sets it."""

from __future__ import annotations

from typing import Any

from strategies import DPOStrategy, Keys, key, register_strategy
from strategies.methods.ipo import CHOOSE_THE_LOSS


class OffsetKeys(Keys):
    dpo_offset: float = key("By how much the reward of the chosen completion should lead, in nats.", 0.5, ge=0)


@register_strategy(keys=OffsetKeys)
class OffsetDPO(DPOStrategy):
    """DPO's data, reference and trainer with a loss of our own."""

    rl = "offset_dpo"
    keys = DPOStrategy.keys - CHOOSE_THE_LOSS | set(OffsetKeys.model_fields)
    requires_reference = True
    batch_kind = "pair"
    best_metric = "eval_rewards/accuracies"

    @classmethod
    def losses(cls, cfg: Any) -> list[str]:
        return ["offset"]

    @classmethod
    def set_training_args_kwargs(cls, cfg: Any) -> dict[str, Any]:
        arguments = super().set_training_args_kwargs(cfg)
        return {**arguments, "loss_type": cls.losses(cfg), "loss_options": {"offset": cfg.dpo_offset}}
