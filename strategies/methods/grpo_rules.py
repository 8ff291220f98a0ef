"""Config rules of grpo, and the arithmetic of its generation batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from strategies.methods.trl_keys import TRLKeys

__all__ = [
    "GenerationBatch",
    "batch_problems",
    "beta_problems",
    "reward_problems",
    "vllm_problems",
    "without_effect",
]

Problem = tuple[str, str]

NUM_GENERATIONS = 8
"""TRL's default."""

# key of `trl:` -> the key of `trl:` that gives it an effect; all keys of vLLM need `use_vllm`
NEEDS = {
    "num_completions_to_print": "log_completions",
    "entropy_target": "use_adaptive_entropy",
    "entropy_coef_delta": "use_adaptive_entropy",
    "entropy_coef_min": "use_adaptive_entropy",
    "entropy_coef_max": "use_adaptive_entropy",
    **{name: "use_vllm" for name in TRLKeys.model_fields if name.startswith("vllm_")},
}
# key -> the vllm_mode that reads it
MODES = {
    "trl.vllm_server_host": "server",
    "trl.vllm_server_port": "server",
    "trl.vllm_server_timeout": "server",
    "trl.vllm_enable_sleep_mode": "colocate",
    "vllm.host": "server",
    "vllm.port": "server",
    "vllm.gpu_memory_utilization": "colocate",
    "vllm.tensor_parallel_size": "colocate",
    "vllm.max_model_len": "colocate",
}
# names of transformers' generation arguments that `trl:` has itself
OWN = {"max_new_tokens": "max_completion_length", "num_return_sequences": "num_generations"}
SAMPLING = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", *OWN}
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
# key of `trl:` -> values of loss_type that read it
READERS = {"epsilon": CLIPPED, "epsilon_high": (*CLIPPED, "cispo"), "delta": CLIPPED}


@dataclass(frozen=True)
class GenerationBatch:
    """Completions generated at once by all workers together."""

    size: int
    """Completions."""
    group: int
    """Completions per prompt."""

    @classmethod
    def of(cls, cfg: Any, world_size: int) -> GenerationBatch:
        """Return TRL's generation batch for a config, even if it doesn't hold whole groups."""
        forward = cfg.micro_batch_size * world_size
        # As TRL's `GRPOConfig.__post_init__`.
        steps = (cfg.trl and cfg.trl.steps_per_generation) or cfg.gradient_accumulation_steps
        size = (cfg.trl and cfg.trl.generation_batch_size) or forward * steps
        return cls(size=size, group=(cfg.trl and cfg.trl.num_generations) or NUM_GENERATIONS)

    @property
    def prompts(self) -> int:
        """Prompts per generation batch."""
        # A batch of less than a group is an error of `batch_problems`; here it must only not be divided by.
        return max(1, self.size // self.group)

    def whole_groups(self, completions: int) -> int:
        """Round up to a multiple of `num_generations`."""
        return _next_multiple(completions, self.group)


def _next_multiple(number: int, divisor: int) -> int:
    return math.ceil(number / divisor) * divisor


def reward_problems(cfg: Any, trl: Any) -> Iterator[Problem]:
    """Yield problems of reward functions and weights."""
    if not trl.reward_funcs:
        yield (
            "trl.reward_funcs",
            "grpo learns from reward functions and none is given; write `trl: {reward_funcs: [my_rewards.my_function]}` for "
            "`def my_function(completions, **columns)` in my_rewards.py, which returns a number per completion",
        )
    elif trl.reward_weights is not None and len(trl.reward_weights) != len(trl.reward_funcs):
        counts = f"got {len(trl.reward_weights)} for {len(trl.reward_funcs)} (trl.reward_funcs)"
        yield "trl.reward_weights", f"{counts}; give one per function"
    elif trl.reward_weights is not None and not any(trl.reward_weights):
        yield "trl.reward_weights", "all weights are 0, so nothing would be learned; make one of them another number"


def beta_problems(cfg: Any, trl: Any) -> Iterator[Problem]:
    """Yield contradictions of the two keys of beta."""
    if trl.beta is not None and cfg.rl_beta is not None and trl.beta != cfg.rl_beta:
        yield "trl.beta", f"{trl.beta:g} contradicts rl_beta: {cfg.rl_beta:g}; keep one of them"
    if trl.use_bias_correction_kl and not (trl.beta or (trl.beta is None and cfg.rl_beta)):
        yield (
            "trl.use_bias_correction_kl",
            "has no effect without trl.beta, which weights the divergence; remove it",
        )


def vllm_problems(cfg: Any, trl: Any) -> Iterator[Problem]:
    """Yield keys of vLLM that are set without vLLM, or in a mode that doesn't read them."""
    if not trl.use_vllm:
        if cfg.vllm is not None:
            yield "vllm", "has no effect without trl.use_vllm: true; set it, or remove this section"
        return
    # Here and below, what follows `or` is TRL's default.
    mode = trl.vllm_mode or "colocate"
    for path, reader in MODES.items():
        section, _, name = path.partition(".")
        if getattr(getattr(cfg, section), name, None) is not None and mode != reader:
            yield path, f"has no effect with trl.vllm_mode: {mode}; it is read by {reader}"
    for name in ("host", "port"):
        trl_value, vllm_value = getattr(trl, f"vllm_server_{name}"), getattr(cfg.vllm, name, None)
        if None not in (trl_value, vllm_value) and trl_value != vllm_value:
            yield f"vllm.{name}", f"{vllm_value} contradicts trl.vllm_server_{name}: {trl_value}; keep one of them"
    least, most = trl.vllm_importance_sampling_clip_min, trl.vllm_importance_sampling_clip_max or 3.0
    if least is not None and least >= most:
        yield (
            "trl.vllm_importance_sampling_clip_min",
            f"{least:g} must be below the greatest ratio, {most:g}",
        )
    ratios = trl.vllm_importance_sampling_mode or "sequence_mask"
    # As `GRPOTrainer.__init__` of TRL, which would raise on the workers.
    if trl.loss_type == "vespo" and trl.vllm_importance_sampling_correction is not False and ratios.startswith("sequence"):
        yield "trl.vllm_importance_sampling_mode", f"loss_type: vespo needs token_truncate or token_mask, not {ratios}"


def without_effect(cfg: Any, trl: Any) -> Iterator[Problem]:
    """Yield keys that have no effect with the others."""
    for name, needed in NEEDS.items():
        if getattr(trl, name) not in (None, False) and not getattr(trl, needed):
            yield f"trl.{name}", f"has no effect without trl.{needed}: true; set it, or remove this key"
    loss = trl.loss_type or "dapo"
    for name, losses in READERS.items():
        if getattr(trl, name) is not None and loss not in losses:
            yield f"trl.{name}", f"has no effect with trl.loss_type: {loss}; it is read by {', '.join(losses)}"
    for name in sorted(SAMPLING & set(trl.generation_kwargs or {})):
        yield (
            f"trl.generation_kwargs.{name}",
            "has a key of its own, which the loss reads too; write it as trl." + OWN.get(name, name),
        )
    # TRL only recommends it: below, delta would bound ratios that the clipping lets pass (INTELLECT-2, arXiv 2505.07291).
    if trl.delta is not None and trl.delta <= 1 + (trl.epsilon or 0.2):
        yield (
            "trl.delta",
            f"{trl.delta:g} must be above 1 + epsilon, {1 + (trl.epsilon or 0.2):g}: it bounds what epsilon doesn't",
        )
    if trl.scale_rewards is not None and trl.multi_objective_aggregation == "normalize_then_sum":
        yield "trl.scale_rewards", "has no effect with trl.multi_objective_aggregation: normalize_then_sum; remove it"
    if trl.steps_per_generation is not None and trl.generation_batch_size is not None:
        yield "trl.steps_per_generation", "contradicts trl.generation_batch_size, which says the same; keep one of them"
    if cfg.include_tokens_per_second:
        yield "include_tokens_per_second", "has no effect with rl: grpo, which logs tokens_per_second itself; remove it"


def batch_problems(cfg: Any, world_size: int) -> Iterator[Problem]:
    """Yield batch sizes that don't hold whole groups of `num_generations` completions."""
    batch = GenerationBatch.of(cfg, world_size)
    forward = cfg.micro_batch_size * world_size
    per_forward = f"micro_batch_size ({cfg.micro_batch_size}) x workers ({world_size})"
    group = f"num_generations ({batch.group})"
    # The fewest forwards of all workers whose completions are whole groups.
    steps = batch.group // math.gcd(batch.group, forward)
    size = cfg.trl and cfg.trl.generation_batch_size
    if size and (size % forward or size % batch.group):
        fix = _next_multiple(size, math.lcm(forward, batch.group))
        yield (
            "trl.generation_batch_size",
            f"{size} must be a multiple of {per_forward} and of {group}; set generation_batch_size: {fix}",
        )
    elif batch.size % batch.group:
        key = "steps_per_generation" if cfg.trl and cfg.trl.steps_per_generation else "gradient_accumulation_steps"
        yield (
            "trl.num_generations",
            f"{batch.group} must divide the generation batch, {per_forward} x {key} ({batch.size // forward}) = {batch.size}, "
            f"so that it holds whole groups; set {key}: {_next_multiple(batch.size // forward, steps)}",
        )
    # Unset, it is made of whole groups (`GRPOStrategy.set_training_args_kwargs`).
    evaluation = (cfg.eval_batch_size or 0) * world_size
    if cfg.eval_strategy != "no" and evaluation % batch.group:
        fix = _next_multiple(cfg.eval_batch_size, batch.group // math.gcd(batch.group, world_size))
        yield (
            "eval_batch_size",
            f"eval_batch_size ({cfg.eval_batch_size}) x workers ({world_size}) must be a multiple of {group}; "
            f"set eval_batch_size: {fix}, or remove it",
        )
