"""`rl: ipo`: identity preference optimisation (arXiv 2310.12036), length-averaged as TRL's."""

from __future__ import annotations

from typing import Any

from strategies.losses.table import LOSSES
from strategies.methods.dpo import OPTIONS, DPOStrategy

__all__ = ["IPOStrategy"]

OF_OTHER_LOSSES = {name for name, option in OPTIONS.items() if option not in LOSSES["ipo"].reads}
# dpo_norm_loss too: ipo averages over tokens itself.
CHOOSE_THE_LOSS = {"dpo_loss_type", "dpo_loss_weights", "dpo_norm_loss"} | OF_OTHER_LOSSES


class IPOStrategy(DPOStrategy):
    """DPO's data, reference and trainer with one loss: `rl: dpo` with `dpo_loss_type: [ipo]`."""

    rl = "ipo"
    keys = DPOStrategy.keys - CHOOSE_THE_LOSS
    requires_reference = True
    batch_kind = "pair"
    best_metric = "eval_rewards/accuracies"

    @classmethod
    def set_training_args_kwargs(cls, cfg: Any) -> dict[str, Any]:
        """Return DPO's arguments, and the loss."""
        return {**super().set_training_args_kwargs(cfg), "loss_type": cls.losses(cfg)}

    @classmethod
    def losses(cls, cfg: Any) -> list[str]:
        """Return `ipo`."""
        return ["ipo"]
