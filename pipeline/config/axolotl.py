"""Axolotl's keys that mean nothing here, and why: a recipe that sets one is refused with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from pipeline.config.datasets import DatasetConfig
from strategies.trl_keys import TRLKeys, VLLMKeys

__all__ = ["REASONS", "without_disabled"]

UNSUPPORTED: dict[str, str] = {
    "write `rl_beta`": "dpo_beta",
    "the last part of `output_dir` names the run": "ray_run_name",
    "write `eval_strategy`": "evaluation_strategy",
    "write `rl_beta` (Axolotl doesn't read it either)": "beta",
    "write `wandb_name`": "wandb_run_name",
    "write `hub_model_id`": "push_to_hub",
    "write `fsdp_config`": "fsdp",
    "write `fsdp_config.fsdp_version`": "fsdp_version",
    "write `fsdp_config.final_state_dict_type`": "fsdp_final_state_dict_type",
    "run with `--debug`": "debug",
    "write `attn_implementation`": (
        "eager_attention flash_attention flash_optimum flex_attention s2_attention sage_attention "
        "sdp_attention xformers_attention"
    ),
    "write `bf16` or `fp16`": "bfloat16 float16 float32",
    "write `micro_batch_size` and `gradient_accumulation_steps`": "auto_find_batch_size batch_size",
    "write `dataset_num_proc`": "dataset_processes",
    "write `sequence_len`, which covers prompt and completion": (
        "eval_sequence_len max_packed_sequence_len max_prompt_len min_sample_len"
    ),
    "`prefray train --resume` continues a run": "auto_resume_from_checkpoints resume_from_checkpoint",
    "the trainer shuffles every epoch from `seed`": (
        "curriculum_sampling shuffle_before_merging_datasets shuffle_merged_datasets"
    ),
    "write `reference: cached` (the default)": "precompute_ref_log_probs",
    "write `sample_packing` (the default) and `tokens_per_forward`": (
        "batch_flattening dpo_padding_free eval_sample_packing fa_varlen_kwargs_in_collator group_by_length "
        "multipack_real_batches pad_to_sequence_len pretrain_multipack_attn pretrain_multipack_buffer_size "
        "sample_packing_bin_size sample_packing_eff_est sample_packing_group_size "
        "sample_packing_mp_start_method sample_packing_sequentially sdpa_varlen "
        "streaming_multipack_buffer_size"
    ),
    "it belongs to a strategy that is not available in this version": "ebft",
    "write `trl.multi_objective_aggregation`": "multi_objective_aggregation",
    "generation and training take turns in this version": (
        "trl.async_prefetch trl.prefetch_depth trl.reroll_max_groups trl.reroll_start_fraction trl.replay_buffer_size "
        "trl.replay_recompute_logps trl.reward_num_workers trl.skip_zero_advantage_batches trl.streaming_min_groups "
        "trl.streaming_partial_batch trl.use_data_producer trl.vllm_lora_sync trl.vllm_sync_interval"
    ),
    "completions come from the policy itself": "trl.rollout_func",
    "write `trl.vllm_importance_sampling_clip_max`": "trl.vllm_importance_sampling_cap",
    "it is an option of the vLLM server's own command line": (
        "vllm.data_parallel_size vllm.device vllm.dtype vllm.enable_prefix_caching vllm.enable_reasoning "
        "vllm.enforce_eager vllm.reasoning_parser vllm.serve_module vllm.worker_extension_cls"
    ),
    "Axolotl has removed it too": (
        "dpo_use_logits_to_keep eval_max_new_tokens eval_table_size flash_attn_rms_norm gc_collect_steps noisy_embedding_alpha"
    ),
    "it is for supervised training, not for preferences": (
        "balance_labels bench_dataset bench_split center_rewards_coefficient chunked_cross_entropy "
        "chunked_cross_entropy_num_chunks diffusion_lm do_bench_eval do_causal_lm_eval eaft_alpha eaft_k "
        "eval_causal_lm_metrics label_balance_window_optim_steps loss_watchdog_patience "
        "loss_watchdog_threshold neftune_noise_alpha num_labels pose_max_context_len pose_num_chunks "
        "pose_split_on_token_ids pretraining_dataset pretraining_sample_concatenation process_reward_model "
        "relora relora_cpu_offload relora_prune_method relora_prune_ratio reward_model role_boundaries "
        "streaming total_num_tokens total_supervised_tokens train_on_inputs use_dft use_eaft use_pose"
    ),
    "text models only": (
        "freeze_mm_modules image_resize_algorithm image_size processor_kwargs processor_type trl.log_multimodal"
    ),
    "it belongs to distributed training that is not available in this version": (
        "activation_offloading context_parallel_size ddp ddp_broadcast_buffers ddp_bucket_cap_mb deepcompile "
        "device device_map dp_replicate_size dp_shard_size experimental_skip_move_to_device fp8 fp8_config "
        "fp8_enable_fsdp_float8_all_gather gpu_memory_limit "
        "heads_k_stride layer_offloading local_rank lora_on_cpu low_cpu_mem_usage max_memory "
        "qlora_sharded_model_loading ring_attn_func selective_checkpointing sequence_parallel_degree "
        "tensor_parallel_size world_size"
    ),
    "the data is prepared by `prefray prepare`, split and sharded by itself": (
        "dataset_keep_in_memory dataset_shard_idx dataset_shard_num is_preprocess num_dataset_shards_to_save "
        "preprocess_iterable push_dataset_to_hub skip_prepare_dataset"
    ),
    "jagged restarts are not available": ("jagged_restart_anneal_steps jagged_restart_steps jagged_restart_warmup_steps"),
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
        "merge_method num_generation_samples nvfp4_merge_aware profiler_steps profiler_steps_start qat "
        "quantization sync_profiler_start_step sync_profiler_steps"
    ),
    "the right class is found from the model's config": (
        "model_type cls_model_config is_falcon_derived_model is_llama_derived_model is_mistral_derived_model "
        "is_qwen_derived_model tokenizer_legacy tokenizer_type tokenizer_use_mistral_common type_of_model"
    ),
    "weights are always saved as safetensors, templates beside the tokenizer": ("save_safetensors tokenizer_save_jinja_files"),
    "only the columns that are needed are read": "remove_unused_columns",
    "put the arguments into the template itself (chat_template_jinja)": (
        "chat_template_kwargs default_system_message eot_tokens"
    ),
    "the loss never builds the full logits anyway": (
        "dpo_use_liger_kernel trl.use_liger_loss tiled_mlp tiled_mlp_num_shards tiled_mlp_use_original_mlp"
    ),
    "log in with `hf auth login` or HF_TOKEN": "hf_use_auth_token",
    "this version has nothing like it": (
        "added_tokens_overrides dynamic_checkpoint embeddings_skip_upcast experts_implementation "
        "fix_untrained_tokens flash_attn_cross_entropy flash_attn_d512 flash_attn_fuse_mlp "
        "flex_attn_compile_kwargs fp32_norm_classes fp32_norms fused_attn_kernel gc_steps "
        "gemma4_hybrid_attn_impl gptq include_tkps large_head_attention llama4_linearized_experts "
        "lora_embedding_kernel lora_fp32_gradients lora_mlp_kernel lora_o_kernel lora_qkv_kernel "
        "mean_resizing_embeddings mixlora_expert_lora_alpha mixlora_expert_lora_dropout mixlora_expert_lora_r "
        "mixlora_jitter_noise mixlora_num_experts mixlora_router_aux_loss_coef mixlora_router_init_range "
        "mixlora_top_k model_quantization_config model_quantization_config_kwargs nf4_backend peft "
        "ple_cpu_offload quantize_moe_experts reinit_weights rope_scaling save_first_step "
        "scaling_softmax scaling_softmax_bias scaling_softmax_factor shrink_embeddings strict "
        "torch_compile_options torch_compile_regional trainer_cls unfrozen_parameters use_kernels "
        "use_onebitllms"
    ),
    "it has no meaning for the rows of a preference dataset here": (
        "conversation field field_human field_model field_thinking input_format input_transform "
        "logprobs_field message_field_training message_field_training_detail preprocess_shards roles_to_train "
        "shards shards_idx split_thinking temperature template_thinking_key train_on_eos train_on_eot "
        "trust_remote_code weight"
    ),
}
"""Reason -> names of the keys that are refused for it; one of a section as `section.key`."""

REASONS: dict[str, str] = {name: reason for reason, names in UNSUPPORTED.items() for name in names.split()}
"""Key -> reason."""


def without_disabled(values: Mapping[str, Any], model: type[BaseModel], section: str = "") -> dict[str, Any]:
    """Leave out keys that are empty, and unsupported ones that are false: a recipe may say that it doesn't use a thing."""
    kept = {
        name: value
        for name, value in values.items()
        if value is not None and not (value is False and section + name in REASONS and name not in model.model_fields)
    }
    for name in ("datasets", "test_datasets"):
        if isinstance(kept.get(name), list):
            kept[name] = [_entry(entry) for entry in kept[name]]
    for name, keys in (("trl", TRLKeys), ("vllm", VLLMKeys)):
        if isinstance(kept.get(name), Mapping):
            kept[name] = without_disabled(kept[name], keys, section=f"{name}.")
    return kept


def _entry(entry: Any) -> Any:
    """A dataset entry without the keys that are empty or unsupported and false."""
    return without_disabled(entry, DatasetConfig) if isinstance(entry, Mapping) else entry
