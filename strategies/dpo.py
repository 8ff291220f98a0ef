"""`rl: dpo`: direct preference optimisation (arXiv 2305.18290) and the pairwise losses that TRL files under it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from strategies.base import Strategy

__all__ = ["LOSS_TYPES", "DPOStrategy"]

LOSS_TYPES = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
)
"""Values of `dpo_loss_type`, by TRL's names."""

SMOOTHED = ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired")
SORTING = ("aot", "aot_unpaired")

# config key -> field of DPOConfig
ARGUMENTS = {
    "rl_beta": "beta",
    "dpo_loss_type": "loss_type",
    "dpo_loss_weights": "loss_weights",
    "dpo_label_smoothing": "label_smoothing",
    "dpo_use_weighting": "use_weighting",
    "dpo_ld_alpha": "ld_alpha",
}


class DPOStrategy(Strategy):
    """Pairs of a chosen and a rejected completion, compared with a reference policy."""

    rl = "dpo"
    keys = frozenset({*ARGUMENTS, "dpo_generate_during_eval"})
    requires_reference = True
    batch_kind = "pair"

    @classmethod
    def get_trainer_class(cls) -> type:
        """`AxolotlDPOTrainer`."""
        from strategies.trainer import AxolotlDPOTrainer

        return AxolotlDPOTrainer

    @classmethod
    def get_training_args_class(cls) -> type:
        """`AxolotlDPOConfig`."""
        from strategies.training_args import AxolotlDPOConfig

        return AxolotlDPOConfig

    @classmethod
    def set_training_args_kwargs(cls, cfg: Any) -> dict[str, Any]:
        """Arguments of `AxolotlDPOConfig` that the method's keys set; keys that are not set keep TRL's default."""
        given = {field: getattr(cfg, name) for name, field in ARGUMENTS.items() if getattr(cfg, name) is not None}
        return {**given, "disable_dropout": cfg.disable_dropout, "truncation_mode": cfg.truncation_mode}

    @classmethod
    def find_problems(cls, cfg: Any) -> Iterator[tuple[str, str]]:
        """Yield (path, message) for losses that don't exist, and for keys that the chosen losses don't read."""
        losses = cfg.dpo_loss_type or ["sigmoid"]
        for index, loss in enumerate(losses):
            if loss not in LOSS_TYPES:
                yield f"dpo_loss_type.{index}", f"unknown loss {loss!r}; available: {', '.join(LOSS_TYPES)}"
        if cfg.dpo_loss_weights is not None and len(cfg.dpo_loss_weights) != len(losses):
            counts = f"got {len(cfg.dpo_loss_weights)} weights for {len(losses)} losses"
            yield "dpo_loss_weights", f"{counts} ({', '.join(losses)}); give one per loss"
        yield from _smoothing_problems(cfg.dpo_label_smoothing, losses)
        if cfg.dpo_use_weighting and set(losses) & set(SORTING):
            sorting = ", ".join(sorted(set(losses) & set(SORTING)))
            yield "dpo_use_weighting", f"can't weight the pairs of {sorting}, which sort the batch; remove one of them"


def _smoothing_problems(smoothing: float | None, losses: list[str]) -> Iterator[tuple[str, str]]:
    path = "dpo_label_smoothing"
    if smoothing and not set(losses) & set(SMOOTHED):
        yield path, f"has no effect with dpo_loss_type: {', '.join(losses)}; it is read by {', '.join(SMOOTHED)}"
    if smoothing and "sigmoid" in losses and len(losses) > 1:
        yield path, "with sigmoid it works only when sigmoid is the one loss; remove it or the other losses"
    if not smoothing and "exo_pair" in losses:
        yield path, "dpo_loss_type: exo_pair needs it above 0; its paper (arXiv 2402.00856) recommends 0.001"
