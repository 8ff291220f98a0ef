"""`rl: dpo`: direct preference optimisation (arXiv 2305.18290) and the pair losses that TRL groups with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, NonNegativeFloat, PositiveFloat

from strategies.keys import Keys, key, options_of
from strategies.losses.table import LOSSES, loss_types
from strategies.methods.base import PAIR_ARGUMENTS, PAIR_KEYS, PairStrategy, pair_arguments
from strategies.methods.reference_sync import SYNC_KEYS, sync_arguments
from strategies.types import ReferenceMode

__all__ = ["DPOKeys", "DPOStrategy"]

OneOrMore = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
"""A list, or its single item."""
BASE_STAYS = (None, True, "true", "True", "gaussian")
"""`peft_init_lora_weights` under which the policy without its adapter is the base. A short list of what `keeps_base` of
`strategies.models.adapter_start` would measure, since recipes are read without torch."""


class DPOKeys(Keys):
    """Keys of pair losses with a reference; `ipo` reads those that don't select the loss."""

    dpo_loss_type: OneOrMore | None = key(
        "Loss, or list of losses to add up, by TRL's names; [sigmoid] when not set.", min_length=1
    )
    dpo_loss_weights: list[NonNegativeFloat] | None = key(
        "Weight of each loss of dpo_loss_type; 1 each when not set.", min_length=1
    )
    dpo_label_smoothing: float | None = key(
        "Probability that a preference label is wrong. sigmoid: conservative DPO; robust: its unbiased form.",
        option="label_smoothing",
        ge=0,
        lt=0.5,
    )
    dpo_use_weighting: bool | None = key("Weight each pair by its likelihood under the policy (WPO).")
    dpo_ld_alpha: float | None = key("Weight of the tokens beyond the shorter completion's length (LD-DPO).", ge=0, le=1)
    dpo_norm_loss: bool | None = key("Losses and rewards of log-probabilities per token, not per completion.")
    dpo_f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] | None = key(
        "Divergence from the reference that beta weighs (f-DPO); reverse_kl, which is DPO's, when not set.",
        option="f_divergence",
    )
    dpo_f_alpha_divergence_coef: float | None = key("alpha of alpha_divergence; 0.5 when not set.", option="alpha")
    dpo_discopop_tau: PositiveFloat | None = key("Temperature of discopop's mixture; 0.05 when not set.", option="discopop_tau")
    rpo_alpha: float | None = key("Weight of the chosen completion's negative log-likelihood per token (RPO).", ge=0)
    reference: ReferenceMode | None = key(
        "cached: log-probabilities of the reference are computed once, by the score stage, and training loads no reference; "
        "live: a reference model beside the policy. cached when not set, unless the run needs the model itself "
        "(trl.sync_ref_model, peft_layer_replication, or dpo_generate_during_eval, unless a new adapter is trained)."
    )
    dpo_generate_during_eval: bool = key("Write a table of policy and reference answers at each evaluation.", False)
    truncation_mode: Literal["keep_start", "keep_end"] = key(
        "End of a raw pair to keep when it is longer than sequence_len (prepared rows follow excess_length_strategy).",
        "keep_start",
    )


OPTIONS = {name: option for name, option in options_of(DPOKeys).items() if option not in ("f_divergence", "alpha")}
"""Config key -> option that it sets and some losses read; those of the divergence have messages of their own."""

# config key -> field of AxolotlDPOConfig
ARGUMENTS = {
    **PAIR_ARGUMENTS,
    "dpo_loss_type": "loss_type",
    "dpo_loss_weights": "loss_weights",
    "dpo_label_smoothing": "label_smoothing",
    "dpo_use_weighting": "use_weighting",
    "dpo_ld_alpha": "ld_alpha",
    "dpo_norm_loss": "norm_loss",
    "dpo_f_divergence_type": "f_divergence_type",
    "dpo_f_alpha_divergence_coef": "f_alpha_divergence_coef",
    "dpo_discopop_tau": "discopop_tau",
    "rpo_alpha": "nll_alpha",
}


class DPOStrategy(PairStrategy):
    """Pairs of a chosen and a rejected completion, compared with a reference policy."""

    rl = "dpo"
    keys = PAIR_KEYS | set(DPOKeys.model_fields) | SYNC_KEYS
    requires_reference = True
    batch_kind = "pair"
    best_metric = "eval_rewards/accuracies"

    @classmethod
    def set_training_args_kwargs(cls, cfg: Any) -> dict[str, Any]:
        """Return the arguments of `AxolotlDPOConfig` that the method's keys set; unset keys keep TRL's default."""
        return {**pair_arguments(cfg, cls.keys, ARGUMENTS), **sync_arguments(cfg)}

    @classmethod
    def reference_mode(cls, cfg: Any) -> ReferenceMode | None:
        """Return `reference`; when it isn't set, cached unless the run needs the model itself."""
        return cfg.reference or ("live" if _needs_model(cfg) else "cached")

    @classmethod
    def find_problems(cls, cfg: Any) -> Iterator[tuple[str, str]]:
        """Yield (path, message) for losses that don't exist, and for keys that the chosen losses don't read."""
        losses = cls.losses(cfg)
        unknown = [(index, loss) for index, loss in enumerate(losses) if loss not in loss_types()]
        for index, loss in unknown:
            # The table has the losses of ipo, simpo and orpo too, which aren't loss types.
            other = f" ({loss} is a strategy: write rl: {loss})" if loss in LOSSES else ""
            yield f"dpo_loss_type.{index}", f"unknown loss {loss!r}{other}; available: {', '.join(loss_types())}"
        if cfg.dpo_loss_weights is not None and len(cfg.dpo_loss_weights) != len(losses):
            counts = f"got {len(cfg.dpo_loss_weights)} for {len(losses)}"
            yield "dpo_loss_weights", f"{counts} (dpo_loss_type: {', '.join(losses)}); give one per loss"
        elif cfg.dpo_loss_weights is not None and not any(cfg.dpo_loss_weights):
            yield "dpo_loss_weights", "all weights are 0, so nothing would be learned; make one of them positive"
        # These rules look up each loss in the table.
        if not unknown:
            yield from _without_effect(cfg, losses)
        if cfg.reference == "cached" and (needed := _needs_model(cfg)):
            yield "reference", f"cached leaves no reference in memory, and {needed} needs it; write live, or remove one of them"

    @classmethod
    def losses(cls, cfg: Any) -> list[str]:
        """Return the names of the losses that are added up."""
        return cfg.dpo_loss_type or ["sigmoid"]


def _needs_model(cfg: Any) -> str | None:
    """Return the key that needs the reference model in memory, or None."""
    if cfg.trl is not None and cfg.trl.sync_ref_model:
        return "trl.sync_ref_model"
    if cfg.peft_layer_replication is not None:
        return "peft_layer_replication"  # the base model itself changes
    # The policy without its adapter is the reference only where the adapter is new, and has left the base's weights alone.
    is_new = cfg.adapter is not None and cfg.lora_model_dir is None
    has_reference = is_new and cfg.reference_model is None and cfg.peft_init_lora_weights in BASE_STAYS
    return "dpo_generate_during_eval" if cfg.dpo_generate_during_eval and not has_reference else None


def _is_set(cfg: Any, path: str) -> bool:
    """Return whether a key differs from its default; 0 of a key without a default (`dpo_label_smoothing`) turns it off."""
    value, default = getattr(cfg, path), DPOKeys.model_fields[path].default
    return bool(value != default and (value or default))


def _without_effect(cfg: Any, losses: list[str]) -> Iterator[tuple[str, str]]:
    chosen = ", ".join(losses)
    for path, option in OPTIONS.items():
        readers = [name for name in loss_types() if option in LOSSES[name].reads]
        if _is_set(cfg, path) and not set(readers) & set(losses):
            yield path, f"has no effect with dpo_loss_type: {chosen}; it is read by {', '.join(readers)}"
    # EXO takes the logarithm of the label smoothing (equation 16).
    if not cfg.dpo_label_smoothing and "exo_pair" in losses:
        yield "dpo_label_smoothing", "dpo_loss_type: exo_pair needs it above 0; its paper (arXiv 2402.00856) recommends 0.001"
    if cfg.dpo_use_weighting and (sorting := [name for name in losses if LOSSES[name].couples and LOSSES[name].reference]):
        yield "dpo_use_weighting", f"can't weight the pairs of {', '.join(sorting)}, which sort the batch; remove one of them"
    if cfg.dpo_ld_alpha is not None and not any(LOSSES[name].reference for name in losses):
        yield "dpo_ld_alpha", f"has no effect with dpo_loss_type: {chosen}, which counts every token in full; remove it"
    yield from _divergence(cfg, losses)
    if cfg.dpo_norm_loss and (averaging := [name for name in losses if LOSSES[name].lengths]):
        yield "dpo_norm_loss", f"dpo_loss_type: {', '.join(averaging)} averages over the tokens itself; remove one of them"


def _divergence(cfg: Any, losses: list[str]) -> Iterator[tuple[str, str]]:
    divergence = cfg.dpo_f_divergence_type or "reverse_kl"
    # A loss without a reference may stand beside: it has no divergence to replace.
    without = [name for name in losses if "f_divergence" not in LOSSES[name].reads and LOSSES[name].reference]
    compared = any(LOSSES[name].reference for name in losses)
    if divergence != "reverse_kl" and (without or not compared):
        readers = ", ".join(name for name in loss_types() if "f_divergence" in LOSSES[name].reads)
        names = ", ".join(without or losses)
        yield "dpo_f_divergence_type", f"{divergence} is not defined for dpo_loss_type: {names}; it is for {readers}"
    if cfg.dpo_f_alpha_divergence_coef is not None and divergence != "alpha_divergence":
        yield (
            "dpo_f_alpha_divergence_coef",
            "has no effect without dpo_f_divergence_type: alpha_divergence; set it",
        )
