"""Names of optimizers and schedules. A test compares them with those of the installed transformers."""

from __future__ import annotations

__all__ = ["OPTIMIZERS", "CUSTOM_SCHEDULES", "SCHEDULES"]

# Copied, not imported from transformers: schemas load without it.
OPTIMIZERS = (
    "adafactor adagrad adalomo adamw_8bit adamw_anyprecision adamw_bnb_8bit adamw_torch adamw_torch_4bit adamw_torch_8bit "
    "adamw_torch_fused adamw_torch_npu_fused adamw_torch_xla ademamix ademamix_8bit apollo_adamw apollo_adamw_layerwise "
    "galore_adafactor galore_adafactor_layerwise galore_adamw galore_adamw_8bit galore_adamw_8bit_layerwise "
    "galore_adamw_layerwise grokadamw lion_32bit lion_8bit lomo paged_adamw_32bit paged_adamw_8bit paged_ademamix_32bit "
    "paged_ademamix_8bit paged_lion_32bit paged_lion_8bit rmsprop rmsprop_bnb rmsprop_bnb_32bit rmsprop_bnb_8bit "
    "schedule_free_adamw schedule_free_radam schedule_free_sgd sgd stable_adamw"
).split()

CUSTOM_SCHEDULES = ("rex", "one_cycle")
"""Schedules that this project adds."""

SCHEDULES = (
    *CUSTOM_SCHEDULES,
    "constant",
    "constant_with_warmup",
    "cosine",
    "cosine_warmup_with_min_lr",
    "cosine_with_min_lr",
    "cosine_with_restarts",
    "greedy",
    "inverse_sqrt",
    "linear",
    "polynomial",
    "reduce_lr_on_plateau",
    "warmup_stable_decay",
)
