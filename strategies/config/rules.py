"""Rules on combinations of keys: contradictions, missing keys, keys without effect.

Each rule takes the config and yields (path, message); all of them are reported at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from strategies.config.adapter import AdapterKeys
from strategies.config.names import OPTIMIZERS, SCHEDULES
from strategies.config.trackers import used_trackers
from strategies.config.trainer import TrackerKeys
from strategies.methods.registry import STRATEGIES, get_strategy, keys_of_strategies
from strategies.models.chat_templates import known_chat_templates
from strategies.models.location import is_hub_id

if TYPE_CHECKING:
    from strategies.config.schema import StrategyConfig
    from strategies.methods.base import Strategy

__all__ = ["find_problems"]

Problem = tuple[str, str]

# key -> (the key that gives it an effect, how to set that one)
NEEDS: dict[str, tuple[str, str]] = {
    "optim_target_modules": ("optimizer", "a GaLore-like optimizer"),
    "gradient_checkpointing_kwargs": ("gradient_checkpointing", "gradient_checkpointing: true"),
    "torch_compile_backend": ("torch_compile", "torch_compile: true"),
    "torch_compile_mode": ("torch_compile", "torch_compile: true"),
    "hub_strategy": ("hub_model_id", "hub_model_id"),
    "hub_revision": ("hub_model_id", "hub_model_id"),
    "hub_private_repo": ("hub_model_id", "hub_model_id"),
    "loraplus_lr_embedding": ("loraplus_lr_ratio", "loraplus_lr_ratio"),
    "loraplus_lr_ratio": ("adapter", "adapter: lora"),
    "cosine_constant_lr_ratio": ("cosine_min_lr_ratio", "cosine_min_lr_ratio"),
    "dataloader_prefetch_factor": ("dataloader_num_workers", "dataloader_num_workers: 1 or more"),
    "dpo_loss_weights": ("dpo_loss_type", "dpo_loss_type"),
    "tokens_per_forward": ("sample_packing", "sample_packing: true"),
    "resize_token_embeddings_to_32x": ("tokens", "tokens, or special_tokens.additional_special_tokens"),
    "greater_is_better": ("metric_for_best_model", "metric_for_best_model"),
    "bnb_config_kwargs": ("load_in_4bit", "load_in_4bit: true or load_in_8bit: true"),
    "image_resize_algorithm": ("image_size", "image_size"),
}
# A needed key -> another one that serves as well.
ALTERNATIVES = {"load_in_4bit": "load_in_8bit", "tokens": "special_tokens"}
# Parts of names; Lion and schedule-free Adam have betas too.
ADAM_LIKE = ("adam", "ademamix", "lion", "schedule_free")
# In transformers 5.23 the handlers of these (`trainer_optimizer.py`) don't read `optim_args`.
WITHOUT_ARGUMENTS = (
    *("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adafactor", "lomo", "adalomo"),
    *("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_32bit", "paged_adamw_8bit"),
    *("lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit"),
)
EXCLUSIVE = [
    ("warmup_steps", "warmup_ratio"),
    ("eval_steps", "evals_per_epoch"),
    ("save_steps", "saves_per_epoch"),
    ("embedding_lr", "embedding_lr_scale"),
    ("lora_target_modules", "lora_target_linear"),
]


def find_problems(cfg: StrategyConfig) -> Iterator[Problem]:
    """Yield (path, message) for every problem of the config."""
    if "trust_remote_code" in (cfg.overrides_of_model_kwargs or {}):
        yield "overrides_of_model_kwargs.trust_remote_code", "has a key of its own: write trust_remote_code"
    for name in ("trust_remote_code", "revision"):
        if name in (cfg.processor_kwargs or {}):
            instead = "trust_remote_code" if name == "trust_remote_code" else "revision_of_model"
            yield f"processor_kwargs.{name}", f"has a key of its own: write {instead}"
    for rule in (
        _method,
        _adapter,
        _revision,
        _patterns,
        _schedule,
        _pairs_of_keys,
        _trackers,
        _cadence,
        _profile,
        _quantization,
    ):
        yield from rule(cfg)


def _is_set(cfg: StrategyConfig, name: str) -> bool:
    """Return whether a key is set to another value than its default or false.

    Args:
        name: a key, or `section.key`.
    """
    section, _, last = name.rpartition(".")
    group = getattr(cfg, section) if section else cfg
    if group is None:
        return False
    value = getattr(group, last)
    # A key set to false, or to its default, asks for nothing: recipes that spell out defaults are valid.
    return value is not False and value != type(group).model_fields[last].default


def _effective(cfg: StrategyConfig, name: str) -> Any:
    return getattr(cfg, name) or (name in ALTERNATIVES and getattr(cfg, ALTERNATIVES[name]))


def _method(cfg: StrategyConfig) -> Iterator[Problem]:
    if cfg.rl not in STRATEGIES:
        return  # reported by `get_strategy`
    strategy = get_strategy(cfg.rl)
    for name in sorted(keys_of_strategies()):
        if _is_set(cfg, name) and name not in strategy.keys:
            readers = [rl for rl, known in STRATEGIES.items() if name in known.keys]
            yield name, f"has no effect with rl: {cfg.rl} (it belongs to rl: {', '.join(readers)}); remove it"
    yield from strategy.find_problems(cfg)
    yield from _reference(cfg, strategy)


def _reference(cfg: StrategyConfig, strategy: type[Strategy]) -> Iterator[Problem]:
    if not strategy.uses_reference(cfg):
        if _is_set(cfg, "reference_model"):
            # A strategy that can use a reference, and doesn't in this run, has beta 0 (grpo).
            why = "" if not strategy.requires_reference else " with beta 0"
            yield "reference_model", f"rl: {cfg.rl}{why} uses no reference model; remove the key"
        if strategy.requires_reference and _is_set(cfg, "trl.sync_ref_model"):
            yield "trl.sync_ref_model", f"rl: {cfg.rl} with beta 0 uses no reference model; set trl.beta, or remove the key"
    if _is_set(cfg, "trl.sync_ref_model") and cfg.adapter is not None:
        yield (
            "trl.sync_ref_model",
            "the reference of an adapter is the model without it, which can't follow; remove `adapter` to train all weights",
        )
    for name in ("trl.ref_model_mixup_alpha", "trl.ref_model_sync_steps"):
        if _is_set(cfg, name) and not _is_set(cfg, "trl.sync_ref_model"):
            yield name, "has no effect without trl.sync_ref_model: true; set it, or remove this key"


def _adapter(cfg: StrategyConfig) -> Iterator[Problem]:
    if cfg.adapter is not None and cfg.freeze_mm_modules:
        yield (
            "freeze_mm_modules",
            "has no effect with an adapter, which leaves the tower alone unless lora_target_modules names it; remove it",
        )
    if cfg.adapter is None:
        for name in AdapterKeys.model_fields:
            if _is_set(cfg, name):
                yield name, "has no effect without an adapter; set `adapter: lora` or remove it"
    elif cfg.lora_target_linear is False and not (cfg.lora_target_modules or cfg.lora_target_parameters or cfg.lora_model_dir):
        yield "lora_target_linear", "false leaves nothing to adapt; name lora_target_modules, or remove it"
    elif cfg.lora_model_dir is not None:
        for name in AdapterKeys.model_fields:
            # The dtype belongs to loading; everything else is in the folder's `adapter_config.json`.
            if _is_set(cfg, name) and name not in ("adapter", "lora_model_dir", "peft_autocast_adapter_dtype"):
                yield name, "has no effect with lora_model_dir: the adapter there brings its own; remove it"


def _revision(cfg: StrategyConfig) -> Iterator[Problem]:
    if cfg.revision_of_model is not None and not is_hub_id(cfg.base_model):
        yield "revision_of_model", f"has no effect with base_model {cfg.base_model!r}, which is no id of the hub; remove it"


def _patterns(cfg: StrategyConfig) -> Iterator[Problem]:
    """Regular expressions of modules, which PEFT and transformers compile when the model is there."""
    targets = cfg.lora_target_modules if isinstance(cfg.lora_target_modules, str) else None
    given = {
        "lora_target_modules": [targets] if targets is not None else [],
        "lora_rank_pattern": cfg.lora_rank_pattern or {},
        "lora_alpha_pattern": cfg.lora_alpha_pattern or {},
    }
    for name, patterns in given.items():
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                yield name, f"{pattern!r} is no regular expression: {error}; correct it, or give the names of modules"


def _schedule(cfg: StrategyConfig) -> Iterator[Problem]:
    for name, known in (("optimizer", OPTIMIZERS), ("lr_scheduler", SCHEDULES)):
        if getattr(cfg, name) not in known:
            yield name, f"unknown {name} {getattr(cfg, name)!r}; available: {', '.join(known)}"
    if cfg.cosine_min_lr_ratio is not None and cfg.lr_scheduler not in ("cosine", "rex"):
        yield "cosine_min_lr_ratio", f"has no effect with lr_scheduler: {cfg.lr_scheduler}; use cosine or rex"
    if cfg.cosine_constant_lr_ratio is not None and cfg.lr_scheduler != "cosine":
        yield "cosine_constant_lr_ratio", f"has no effect with lr_scheduler: {cfg.lr_scheduler}; use cosine"
    for name in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        is_read = any(kind in cfg.optimizer for kind in ADAM_LIKE) and cfg.optimizer != "schedule_free_sgd"
        is_read = is_read and not (name == "adam_epsilon" and "lion" in cfg.optimizer)
        if _is_set(cfg, name) and not is_read:
            yield name, f"has no effect with optimizer: {cfg.optimizer}; remove it"
    if cfg.optim_args and cfg.optimizer in WITHOUT_ARGUMENTS:
        yield "optim_args", f"has no effect with optimizer: {cfg.optimizer}; remove it"
    if cfg.lr_scheduler_kwargs and cfg.lr_scheduler == "rex":
        yield "lr_scheduler_kwargs", "has no effect with lr_scheduler: rex; its floor is cosine_min_lr_ratio"


def _pairs_of_keys(cfg: StrategyConfig) -> Iterator[Problem]:
    for name, (needed, remedy) in NEEDS.items():
        if _is_set(cfg, name) and not _effective(cfg, needed):
            yield name, f"has no effect without {needed}; set {remedy}, or remove it"
    for first, second in EXCLUSIVE:
        if _is_set(cfg, first) and _is_set(cfg, second):
            yield second, f"contradicts {first}; keep one of them"
    if cfg.chat_template == "jinja" and not cfg.chat_template_jinja:
        yield "chat_template", "jinja needs chat_template_jinja, the template itself or its file"
    if cfg.chat_template_jinja and cfg.chat_template not in (None, "jinja"):
        yield "chat_template_jinja", f"has no effect with chat_template: {cfg.chat_template}; set chat_template: jinja"
    if cfg.chat_template not in (None, "jinja"):
        bare = cfg.chat_template.removeprefix("tokenizer_default_fallback_")
        if cfg.chat_template != "tokenizer_default" and bare not in known_chat_templates():
            yield "chat_template", f"unknown template {cfg.chat_template!r}; built in: {', '.join(known_chat_templates())}"


def _trackers(cfg: StrategyConfig) -> Iterator[Problem]:
    used = used_trackers(cfg)
    for name in TrackerKeys.model_fields:
        # Keys are named after their tracker: `wandb_project`, `hf_mlflow_log_artifacts`; `use_NAME` is the switch itself.
        tracker = name.removeprefix("hf_").split("_")[0]
        if tracker != "use" and _is_set(cfg, name) and tracker not in used:
            yield name, f"has no effect without use_{tracker}: true; set it or remove this key"


def _profile(cfg: StrategyConfig) -> Iterator[Problem]:
    if cfg.profile is not None and cfg.max_steps is not None and cfg.profile.steps[0] > cfg.max_steps:
        yield "profile.steps", beyond(cfg.profile.steps[0], cfg.max_steps)


def beyond(first: int, steps: int) -> str:
    """Return why a run of so many steps has no trace from step `first` on."""
    return f"step {first} is after the run's last, {steps}; give steps from 1 to {steps}"


def _cadence(cfg: StrategyConfig) -> Iterator[Problem]:
    for kind, per_epoch in (("eval", "evals_per_epoch"), ("save", "saves_per_epoch")):
        strategy = getattr(cfg, f"{kind}_strategy")
        for name in (f"{kind}_steps", per_epoch):
            if _is_set(cfg, name) and strategy not in (None, "steps"):
                yield name, f"has no effect with {kind}_strategy: {strategy}; use steps, or remove one of them"
        if strategy == "steps" and not (_is_set(cfg, f"{kind}_steps") or _is_set(cfg, per_epoch)):
            yield f"{kind}_strategy", f"steps needs {kind}_steps or {per_epoch}"
    if cfg.metric_for_best_model and not (
        cfg.load_best_model_at_end or cfg.early_stopping_patience or cfg.save_strategy == "best"
    ):
        yield (
            "metric_for_best_model",
            "has no effect without load_best_model_at_end, early_stopping_patience or save_strategy: best",
        )


def _quantization(cfg: StrategyConfig) -> Iterator[Problem]:
    if cfg.load_in_4bit and cfg.load_in_8bit:
        yield "load_in_8bit", "contradicts load_in_4bit; keep one of them"
    for name in ("load_in_4bit", "load_in_8bit"):
        if getattr(cfg, name) and cfg.adapter is None:
            yield name, "quantized weights can't be trained in full; set `adapter: lora` or `qlora`"
    if cfg.adapter == "qlora" and not (cfg.load_in_4bit or cfg.load_in_8bit):
        yield "adapter", "qlora means a quantized base; set load_in_4bit: true, or `adapter: lora`"
    if cfg.bf16 in (True, "full") and cfg.fp16:
        yield "fp16", f"contradicts bf16: {str(cfg.bf16).lower()}; keep one of them"
