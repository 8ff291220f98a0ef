"""Tables of Axolotl's keys that this package lacks: keys with an equivalent, keys that change no result, unsupported ones."""

from __future__ import annotations

import re
from typing import Any

__all__ = [
    "DEEPSPEED_FILE",
    "FSDP1_KEYS",
    "FSDP_WORDS",
    "KERNEL_PLUGINS",
    "NAME",
    "NAMES",
    "NEUTRAL_KEYS",
    "OFF_NUMBERS",
    "OFF_WITH",
    "OFF_WORDS",
    "OLD_VALUES",
    "REASONS",
    "RENAMED",
    "SECTIONS",
    "SHARDING_STRATEGIES",
    "UNUSUAL_LAYERS",
    "USER_DEFINED",
    "Values",
]

Values = dict[str, Any]

RENAMED: dict[str, str] = {
    "beta": "rl_beta",
    "dpo_beta": "rl_beta",
    "evaluation_strategy": "eval_strategy",
    "wandb_run_name": "wandb_name",
    "bfloat16": "bf16",
    "float16": "fp16",
    "dataset_processes": "dataset_num_proc",
}
"""Axolotl's name (older or unread ones included) -> ours."""

NEUTRAL: dict[str, str] = {
    "`sequence_len` covers prompt and answer; Axolotl 0.21 doesn't read it either": "max_prompt_len",
    "each answer is trained up to the end of its turn": "eot_tokens",
    "it only makes other kernels": (
        "unsloth_cross_entropy_loss unsloth_lora_mlp unsloth_lora_qkv unsloth_lora_o unsloth_rms_norm unsloth_rope"
    ),
    "each answer's tokens are trained on, and nothing else": (
        "train_on_inputs train_on_eos train_on_eot roles_to_train message_field_training message_field_training_detail"
    ),
    "batches are packed (`sample_packing`, `tokens_per_forward`), which changes no number": (
        "batch_flattening dpo_padding_free eval_sample_packing fa_varlen_kwargs_in_collator group_by_length "
        "multipack_real_batches pad_to_sequence_len pretrain_multipack_attn pretrain_multipack_buffer_size "
        "sample_packing_bin_size sample_packing_eff_est sample_packing_group_size "
        "sample_packing_mp_start_method sample_packing_sequentially sdpa_varlen "
        "streaming_multipack_buffer_size"
    ),
    "the trainer shuffles every epoch from `seed`": "shuffle_before_merging_datasets shuffle_merged_datasets",
    "Axolotl has no use for it with `rl` either": (
        "dpo_use_logits_to_keep eval_max_new_tokens eval_table_max_new_tokens eval_table_size flash_attn_rms_norm "
        "gc_collect_steps "
        "loss_watchdog_patience loss_watchdog_threshold"
    ),
    "kernels of its own compute the same numbers; attention is chosen by the hardware, or by `attn_implementation`": (
        "flash_attention flash_optimum s2_attention sage_attention xformers_attention "
        "flash_attn_cross_entropy flash_attn_fuse_mlp flash_attn_fuse_qkv landmark_attention "
        "lora_mlp_kernel lora_qkv_kernel lora_o_kernel "
        "lora_embedding_kernel"
    ),
    "the loss never builds the full logits anyway": (
        "dpo_use_liger_kernel trl.use_liger_loss tiled_mlp tiled_mlp_num_shards tiled_mlp_use_original_mlp "
        "liger_rope liger_rms_norm liger_rms_norm_gated liger_layer_norm liger_glu_activation liger_swiglu "
        "liger_cross_entropy liger_fused_linear_cross_entropy liger_use_token_scaling cut_cross_entropy"
    ),
    "the right class is found from the model's config": (
        "model_type cls_model_config is_falcon_derived_model is_llama_derived_model is_mistral_derived_model "
        "is_qwen_derived_model tokenizer_legacy tokenizer_type type_of_model"
    ),
    "weights are always saved as safetensors, templates beside the tokenizer": ("save_safetensors tokenizer_save_jinja_files"),
    "only the columns that are needed are read": "remove_unused_columns",
    "log in with `hf auth login` or HF_TOKEN": "hf_use_auth_token use_auth_token hub_always_push",
    "activations aren't offloaded, which changes no number": "activation_offloading",
    "the first step is logged where `logging_steps` is 1": "logging_first_step",
    "each tracker has a key: use_wandb, use_mlflow, use_tensorboard": "report_to",
    "what it named is no longer read by Axolotl either": "lora_out_dir gptq_model_v1 rl_adapter_ref_model",
    "the type of the dataset says it": "conversation",
    "`ray.num_workers` says it": "dp_shard_size",
    "the last part of `output_dir` names the run": "ray_run_name",
    "Ray places the workers, and each loads the model where it trains it": (
        "experimental_skip_move_to_device "
        "lora_on_cpu low_cpu_mem_usage local_rank world_size device device_map ddp ddp_backend gpu_memory_limit max_memory"
    ),
    "the data is prepared by `prefray prepare`, split and sharded by itself": (
        "dataset_keep_in_memory dataset_shard_idx dataset_shard_num is_preprocess num_dataset_shards_to_save "
        "preprocess_iterable skip_prepare_dataset"
    ),
    "it only measures or checks": (
        "strict include_tkps gc_steps sync_profiler_start_step sync_profiler_steps profiler_steps profiler_steps_start debug"
    ),
    "give `prefray train --resume`": "auto_resume_from_checkpoints",
}
"""Reason -> keys that change no result, and are left out."""

NEUTRAL_KEYS: dict[str, str] = {name: reason for reason, names in NEUTRAL.items() for name in names.split()}
"""Key -> reason."""

UNSUPPORTED: dict[str, str] = {
    "write `attn_implementation`": "eager_attention flex_attention sdp_attention",
    "write `reference: cached` (the default)": "precompute_ref_log_probs",
    "write `fsdp_config`": "fsdp fsdp_version fsdp_final_state_dict_type",
    "write `hub_model_id`": "push_to_hub",
    "write `bf16` or `fp16`": "float32",
    "write `micro_batch_size` and `gradient_accumulation_steps`": "auto_find_batch_size batch_size",
    "write `sequence_len`, which covers prompt and completion": ("eval_sequence_len max_packed_sequence_len min_sample_len"),
    "`prefray train --resume` continues a run": "resume_from_checkpoint",
    "the trainer shuffles every epoch from `seed`": "curriculum_sampling",
    "it belongs to a strategy that is not available in this version": "ebft",
    "write `trl.multi_objective_aggregation`": "multi_objective_aggregation",
    "generation and training take turns in this version": (
        "trl.async_prefetch trl.prefetch_depth trl.reroll_max_groups trl.reroll_start_fraction "
        "trl.replay_buffer_size trl.replay_recompute_logps trl.reward_num_workers "
        "trl.skip_zero_advantage_batches trl.streaming_min_groups trl.streaming_partial_batch "
        "trl.use_data_producer trl.vllm_lora_sync trl.vllm_sync_interval"
    ),
    "completions come from the policy itself": "trl.rollout_func",
    "write `trl.vllm_importance_sampling_clip_max`": "trl.vllm_importance_sampling_cap",
    "it is an option of the vLLM server's own command line": (
        "vllm.data_parallel_size vllm.device vllm.dtype vllm.enable_prefix_caching vllm.enable_reasoning "
        "vllm.enforce_eager vllm.reasoning_parser vllm.serve_module vllm.worker_extension_cls"
    ),
    "Axolotl has removed it too": "noisy_embedding_alpha",
    "it is for supervised training, not for preferences": (
        "balance_labels bench_dataset bench_split center_rewards_coefficient chunked_cross_entropy "
        "chunked_cross_entropy_num_chunks diffusion_lm do_bench_eval do_causal_lm_eval eaft_alpha eaft_k "
        "eval_causal_lm_metrics label_balance_window_optim_steps neftune_noise_alpha num_labels "
        "pose_max_context_len pose_num_chunks pose_split_on_token_ids pretraining_dataset "
        "pretraining_sample_concatenation process_reward_model relora relora_cpu_offload relora_prune_method "
        "relora_prune_ratio reward_model role_boundaries streaming total_num_tokens total_supervised_tokens "
        "use_dft use_eaft use_pose"
    ),
    "prompts are text alone with grpo": "trl.log_multimodal",
    "it belongs to distributed training that is not available in this version": (
        "context_parallel_size ddp_broadcast_buffers ddp_bucket_cap_mb deepcompile "
        "dp_replicate_size fp8 fp8_config "
        "fp8_enable_fsdp_float8_all_gather heads_k_stride layer_offloading qlora_sharded_model_loading "
        "ring_attn_func selective_checkpointing sequence_parallel_degree tensor_parallel_size"
    ),
    "the data is prepared by `prefray prepare`, split and sharded by itself": "push_dataset_to_hub",
    "jagged restarts are not available": "jagged_restart_anneal_steps jagged_restart_steps jagged_restart_warmup_steps",
    "this optimizer is not available": (
        "adam_beta3 adam_epsilon2 dion_lr dion_momentum dion_rank_fraction dion_rank_multiple_of "
        "lisa_layers_attribute lisa_n_layers lisa_step_interval lr_div_factor lr_quadratic_warmup "
        "qgalore_cos_threshold qgalore_gamma_proj qgalore_proj_bits qgalore_proj_group_size "
        "qgalore_proj_quant qgalore_proj_type qgalore_queue_size qgalore_rank qgalore_scale "
        "qgalore_update_proj_gap torchdistx_path"
    ),
    "this tracker is not available": (
        "comet_api_key comet_experiment_config comet_experiment_key comet_mode comet_online "
        "comet_project_name comet_workspace gradio_max_new_tokens gradio_server_name gradio_server_port "
        "gradio_share gradio_temperature gradio_title otel_metrics_host otel_metrics_port use_comet "
        "use_otel_metrics"
    ),
    "a command of its own does this": (
        "axolotl_config_path export generate_samples generation_do_sample generation_max_new_tokens "
        "generation_prompt_ratio generation_temperature generation_top_k generation_top_p merge_lora "
        "merge_method num_generation_samples nvfp4_merge_aware qat quantization"
    ),
    "the right class is found from the model's config": "tokenizer_use_mistral_common",
    "put the arguments into the template itself (chat_template_jinja)": ("chat_template_kwargs default_system_message"),
    "this version has nothing like it": (
        "added_tokens_overrides dynamic_checkpoint embeddings_skip_upcast experts_implementation "
        "fix_untrained_tokens flash_attn_d512 flex_attn_compile_kwargs fp32_norm_classes fp32_norms "
        "fused_attn_kernel gemma4_hybrid_attn_impl gptq large_head_attention llama4_linearized_experts "
        "lora_fp32_gradients mean_resizing_embeddings mixlora_expert_lora_alpha mixlora_expert_lora_dropout "
        "mixlora_expert_lora_r mixlora_jitter_noise mixlora_num_experts mixlora_router_aux_loss_coef "
        "mixlora_router_init_range mixlora_top_k model_quantization_config model_quantization_config_kwargs "
        "nf4_backend peft ple_cpu_offload quantize_moe_experts reinit_weights rope_scaling save_first_step "
        "scaling_softmax scaling_softmax_bias scaling_softmax_factor shrink_embeddings torch_compile_options "
        "torch_compile_regional trainer_cls unfrozen_parameters use_kernels use_onebitllms use_scattermoe "
        "use_sonicmoe"
    ),
    "it has no meaning for the rows of a preference dataset here": (
        "field field_human field_model field_thinking input_format input_transform "
        "logprobs_field preprocess_shards shards shards_idx split_thinking temperature template_thinking_key "
        "trust_remote_code weight"
    ),
}
"""Reason -> names of the keys that are rejected for it; a section's key is written `section.key`."""

REASONS: dict[str, str] = {name: reason for reason, names in UNSUPPORTED.items() for name in names.split()}
"""Key -> reason."""


OFF_NUMBERS: dict[str, tuple[int, ...]] = {
    "max_steps": (-1, 0),
    "eval_steps": (0,),
    "evals_per_epoch": (0,),
    "saves_per_epoch": (0,),
    "early_stopping_patience": (0,),
    "neftune_noise_alpha": (0,),
    "noisy_embedding_alpha": (0,),
    "relora_steps": (0,),
    "shards": (1,),
    "dp_shard_size": (1,),
    "dp_replicate_size": (1,),
    "context_parallel_size": (1,),
    "sequence_parallel_degree": (1,),
    "tensor_parallel_size": (1,),
}
"""Key -> numbers that turn its feature off."""
OLD_VALUES: dict[str, dict[str, str]] = {
    "optimizer": {"ao_adamw_4bit": "adamw_torch_4bit", "ao_adamw_8bit": "adamw_torch_8bit"},
    "type": {"argilla_apply_chatml": "chatml.argilla", "intel_apply_chatml": "chatml.intel"},
}
"""Key, of the recipe or of a dataset -> Axolotl's value -> ours."""
OFF_WORDS = {"wandb_watch": ("false",), "wandb_log_model": ("false",)}
"""Key -> words that turn its feature off."""
OFF_WITH: dict[str, tuple[str, ...]] = {
    "adapter": ("lora_", "loraplus_", "peft_"),
    "gradient_checkpointing": ("gradient_checkpointing_kwargs",),
    "hub_model_id": ("hub_", "push_to_hub"),
    "torch_compile": ("torch_compile_",),
    "val_set_size": ("evals_per_epoch", "eval_steps", "eval_strategy", "evaluation_strategy"),
    "wandb_project": ("wandb_",),
}
"""Main key -> prefixes of keys that have no effect when it is empty or off."""
UNUSUAL_LAYERS = re.compile(r"embed|head|wte|wpe|norm|router|\.gate\b")
"""Matches names of modules that `lora_target_linear` doesn't cover."""
USER_DEFINED = ("user_defined", "user_defined.default")
"""Values of `type` whose keys Axolotl accepts under `type`."""
SECTIONS = ("deepspeed", "fsdp_config", "trl", "vllm")
"""Keys whose values are sections, which may be off."""
KERNEL_PLUGINS = ("axolotl.integrations.liger.", "axolotl.integrations.cut_cross_entropy.", "axolotl.integrations.kernels.")
"""Prefixes of Axolotl's plugins that only add kernels."""
DEEPSPEED_FILE = re.compile(r"zero([123])(?:_bf16)?(_cpuoffload_\w+)?(?:_torch_compile)?\.json")
"""Names of Axolotl's config files, which are in its repository."""
NAME = re.compile(r"[\w.]+")
NAMES = re.compile(r"[\w.]+(?:[\s,]+[\w.]+)*")
"""Several names of modules in one string, without regular expression syntax; excludes PEFT's `all-linear`."""
FSDP1_KEYS = {
    "activation_cpu_offload": "activations aren't offloaded",
    "cpu_ram_efficient_loading": "each worker loads its own part",
    "backward_prefetch": "FSDP2 has its own order",
    "backward_prefetch_policy": "FSDP2 has its own order",
    "forward_prefetch": "FSDP2 has its own order",
    "limit_all_gathers": "FSDP2 always does",
    "sync_module_states": "FSDP2 always does",
    "use_orig_params": "FSDP2 always does",
}
"""Keys of FSDP 1 that change no result."""
SHARDING_STRATEGIES = {"FULL_SHARD": True, "SHARD_GRAD_OP": False, "1": True, "2": False}
"""FSDP 1's strategy -> whether FSDP 2 frees weights after the forward (`reshard_after_forward`)."""


FSDP_WORDS: dict[str, Values] = {
    "full_shard": {},
    "auto_wrap": {},
    "shard_grad_op": {"reshard_after_forward": False},
    "offload": {"offload_params": True},
}
"""Words of `fsdp:` -> keys of FSDP2's section."""
