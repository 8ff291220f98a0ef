"""The sections `trl:` and `vllm:`: how grpo generates, rewards and learns. What is not set keeps TRL's default."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from strategies.keys import Keys, key

__all__ = ["TRLKeys", "VLLMKeys"]

Part = Annotated[float, Field(gt=0, le=1)]
Losses = Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"]
Modes = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


class TRLKeys(Keys):
    """The section `trl:`."""

    # Rewards
    reward_funcs: list[str] | None = key(
        "Reward functions as module.function, importable on every worker (the current directory counts), or folders and hub "
        "ids of reward models (sequence classification, one label)."
    )
    reward_weights: list[float] | None = key("Weight of each reward function; 1 each when not set.")
    scale_rewards: Literal["group", "batch", "none"] | bool | None = key(
        "Divide advantages by the standard deviation of the rewards of the group (true, group) or of the batch (batch), or not "
        "at all (false, none); group when not set."
    )
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] | None = key(
        "Add the rewards, then normalise (sum_then_normalize, when not set), or normalise each first (GDPO)."
    )

    # Generation
    num_generations: int | None = key("Completions per prompt, a group; 8 when not set.", ge=2)
    generation_batch_size: PositiveInt | None = key(
        "Completions generated at once by all workers; those of gradient_accumulation_steps forwards when not set."
    )
    steps_per_generation: PositiveInt | None = key(
        "Forwards that share one generation; gradient_accumulation_steps when not set."
    )
    max_completion_length: PositiveInt | None = key("Maximum tokens of a completion; 512 when not set.")
    temperature: PositiveFloat | None = key("Temperature of sampling and of the loss's log-probabilities; 1 when not set.")
    top_p: Part | None = key("Sample from the likeliest tokens of this total probability; 1 (all) when not set.")
    top_k: NonNegativeInt | None = key("Sample from this many likeliest tokens; 0 (all) when not set.")
    min_p: float | None = key("Exclude tokens below this fraction of the likeliest one's probability.", ge=0, le=1)
    repetition_penalty: PositiveFloat | None = key("Above 1, tokens that have occurred become less likely; 1 when not set.")
    generation_kwargs: dict[str, Any] | None = key("Further arguments of transformers' GenerationConfig, or vLLM's.")
    chat_template_kwargs: dict[str, Any] | None = key("Arguments of the chat template when prompts are rendered.")

    # Loss
    beta: NonNegativeFloat | None = key("Weight of the divergence from the reference; 0, no reference, when not set.")
    loss_type: Losses | None = key("How token losses are clipped and averaged; dapo when not set.")
    num_iterations: PositiveInt | None = key("Passes over each generated batch; 1 when not set.")
    epsilon: PositiveFloat | None = key("Clip probability ratios below 1 - epsilon; 0.2 when not set.")
    epsilon_high: PositiveFloat | None = key("Clip them above 1 + epsilon_high (cispo: above it); epsilon when not set.")
    delta: PositiveFloat | None = key("Upper bound of ratios whose advantage is negative; above 1 + epsilon. Off when not set.")
    importance_sampling_level: Literal["token", "sequence"] | None = key(
        "Probability ratio per token (when not set) or per sequence (GSPO)."
    )
    mask_truncated_completions: bool | None = key("Exclude completions that reach max_completion_length from the loss.")
    off_policy_mask_threshold: PositiveFloat | None = key(
        "Exclude completions with negative advantage that diverge by more than this, in nats per token. Off when not set."
    )
    use_bias_correction_kl: bool | None = key("Weight the divergence by the probability ratio; true when not set.")
    entropy_coef: NonNegativeFloat | None = key("Weight of an entropy bonus, initial weight if it is adaptive; 0 when not set.")
    use_adaptive_entropy: bool | None = key("Adapt entropy_coef every step so that the entropy stays at entropy_target.")
    entropy_target: NonNegativeFloat | None = key("Mean entropy per token, in nats, to hold; 0.2 when not set.")
    entropy_coef_delta: NonNegativeFloat | None = key("Change of an adaptive entropy_coef per step; 0.005 when not set.")
    entropy_coef_min: NonNegativeFloat | None = key("Minimum adaptive entropy_coef; 0 when not set.")
    entropy_coef_max: NonNegativeFloat | None = key("Maximum adaptive entropy_coef; 1 when not set.")

    # Reference
    sync_ref_model: bool | None = key("Let the reference follow the policy (TR-DPO); needs full fine-tuning.")
    ref_model_mixup_alpha: Part | None = key("Weight of the policy in the new reference; 0.6 when not set.")
    ref_model_sync_steps: PositiveInt | None = key("Optimizer steps between two updates of the reference; 512 when not set.")

    # Logging
    log_completions: bool | None = key("Print completions with their rewards, and keep them in {output_dir}/completions.")
    num_completions_to_print: PositiveInt | None = key("Completions to print; all when not set.")

    # vLLM
    use_vllm: bool | None = key("Generate with vLLM (GPU only, a separate package) instead of transformers.")
    vllm_mode: Literal["server", "colocate"] | None = key(
        "vLLM as a separate server or in the training processes (colocate, when not set)."
    )
    vllm_server_host: str | None = key("Host of the vLLM server; 0.0.0.0 when not set.")
    vllm_server_port: int | None = key("Port of the vLLM server; 8000 when not set.", ge=1, le=65535)
    vllm_server_timeout: PositiveFloat | None = key("Seconds to wait for the vLLM server; 240 when not set.")
    vllm_guided_decoding_regex: str | None = key("Regular expression that completions must match.")
    vllm_enable_sleep_mode: bool | None = key("Move vLLM's memory off the GPU during the optimizer step.")
    vllm_importance_sampling_correction: bool | None = key(
        "Weight the loss by the policy's probabilities over vLLM's; true when not set."
    )
    vllm_importance_sampling_mode: Modes | None = key("How these ratios are taken and bounded; sequence_mask when not set.")
    vllm_importance_sampling_clip_min: NonNegativeFloat | None = key("Minimum ratio; no bound when not set.")
    vllm_importance_sampling_clip_max: PositiveFloat | None = key("Maximum ratio; 3 when not set.")


class VLLMKeys(Keys):
    """The section `vllm:`, as far as the trainer reads it; a server takes its own options on its command line."""

    host: str | None = key("As trl.vllm_server_host.")
    port: int | None = key("As trl.vllm_server_port.", ge=1, le=65535)
    gpu_memory_utilization: Part | None = key("Fraction of the GPU's memory that a colocated vLLM takes; 0.3 when not set.")
    tensor_parallel_size: PositiveInt | None = key("GPUs over which a colocated vLLM is split; 1 when not set.")
    max_model_len: PositiveInt | None = key("Maximum tokens of prompt and completion in a colocated vLLM.")
