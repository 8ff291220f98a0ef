"""`rl: grpo`: group-relative policy optimisation (arXiv 2402.03300): prompts, generated completions, reward functions."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from strategies import trainers
from strategies.keys import Keys, key
from strategies.methods.base import Strategy, of_evaluation
from strategies.methods.grpo_rules import (
    GenerationBatch,
    batch_problems,
    beta_problems,
    reward_problems,
    vllm_problems,
    without_effect,
)
from strategies.methods.trl_keys import TRLKeys, VLLMKeys
from strategies.rewards import load_reward_functions

__all__ = ["GRPOKeys", "GRPOStrategy", "TRLKeys", "VLLMKeys"]

# key of `trl:` -> field of AxolotlGRPOConfig, where the two have different names
RENAMED = {"vllm_guided_decoding_regex": "vllm_structured_outputs_regex"}
# keys of `trl:` that are not passed on directly: `reward_funcs` goes to the trainer, `beta` may also be `rl_beta`
ELSEWHERE = {"reward_funcs", "beta"}
# key of `vllm:` -> field of AxolotlGRPOConfig
VLLM_ARGUMENTS = {
    "host": "vllm_server_host",
    "port": "vllm_server_port",
    "gpu_memory_utilization": "vllm_gpu_memory_utilization",
    "tensor_parallel_size": "vllm_tensor_parallel_size",
    "max_model_len": "vllm_max_model_length",
}


class GRPOKeys(Keys):
    """Keys of GRPO."""

    trl: TRLKeys | None = key("Generation, rewards and loss of grpo; the moving reference of dpo, ipo, kto and grpo.")
    vllm: VLLMKeys | None = key("The vLLM engine or server that grpo generates with (trl.use_vllm).")


GENERATED_METRICS = (
    "reward",
    "reward_std",
    "entropy",
    "completions/mean_length",
    "completions/max_length",
    "completions/clipped_ratio",
    "frac_reward_zero_std",
)
"""TRL's metrics of completions generated for an evaluation."""


class GRPOStrategy(Strategy):
    """Prompts; the policy generates a group of completions for each and learns from their relative rewards."""

    rl = "grpo"
    keys = frozenset({"rl_beta", "disable_dropout", "vllm", *(f"trl.{name}" for name in TRLKeys.model_fields)})
    requires_reference = True
    batch_kind = "prompt"
    best_metric = "eval_reward"

    @classmethod
    def get_trainer_class(cls) -> type:
        """Return `AxolotlGRPOTrainer`."""
        return trainers.AxolotlGRPOTrainer

    @classmethod
    def get_training_args_class(cls) -> type:
        """Return `AxolotlGRPOConfig`."""
        return trainers.AxolotlGRPOConfig

    @classmethod
    def set_training_args_kwargs(cls, cfg: Any) -> dict[str, Any]:
        """Return the arguments of `AxolotlGRPOConfig` that the method's keys set.

        If `eval_batch_size` is not set, an evaluation batch holds whole groups per worker, so that it works with any number
        of workers.
        """
        trl = {} if cfg.trl is None else cfg.trl.model_dump(exclude_none=True, exclude=ELSEWHERE)
        vllm = {} if cfg.vllm is None else cfg.vllm.model_dump(exclude_none=True)
        arguments = {VLLM_ARGUMENTS[name]: value for name, value in vllm.items()}
        # The same arguments by other names: where both sections set one, `vllm_problems` has found them equal.
        arguments |= {RENAMED.get(name, name): value for name, value in trl.items()}
        if cfg.eval_batch_size is None:
            # `whole_groups` reads the size of a group alone, so any number of workers will do.
            arguments["per_device_eval_batch_size"] = GenerationBatch.of(cfg, 1).whole_groups(cfg.micro_batch_size)
        return {"beta": cls.beta(cfg), "disable_dropout": cfg.disable_dropout, **arguments}

    @classmethod
    def set_trainer_kwargs(cls, cfg: Any) -> dict[str, Any]:
        """Return `reward_funcs`: functions, and folders or hub ids of reward models.

        Raises:
            ValueError: for a reward function that can't be loaded, and for vLLM if it isn't installed. Both depend on the
                training machine, so they are not checked with the config.
        """
        if cfg.trl.use_vllm and find_spec("vllm") is None:
            raise ValueError(
                "trl.use_vllm: the package vllm is not installed here; install it (GPU only), or remove the key to "
                "generate with transformers"
            )
        if not cfg.trl.use_vllm:
            _check_generation(cfg.trl.generation_kwargs or {})
        return {"reward_funcs": load_reward_functions(cfg.trl.reward_funcs)}

    @classmethod
    def beta(cls, cfg: Any) -> float:
        """Return the weight of the divergence from the reference: `trl.beta`, else `rl_beta`, else 0."""
        beta = None if cfg.trl is None else cfg.trl.beta
        # `trl.beta: 0` is a value, which `rl_beta` doesn't replace.
        return beta if beta is not None else cfg.rl_beta or 0.0

    @classmethod
    def uses_reference(cls, cfg: Any) -> bool:
        """Return whether the divergence from the reference has a weight."""
        return cls.beta(cfg) > 0

    @classmethod
    def sequences_per_epoch(cls, num_rows: int, cfg: Any, world_size: int) -> int:
        """Return the completions trained on in one epoch over `num_rows` prompts.

        Prompts that don't fill a generation batch are dropped; every batch is trained on `trl.num_iterations` times.
        """
        batch = GenerationBatch.of(cfg, world_size)
        iterations = (cfg.trl and cfg.trl.num_iterations) or 1
        # As TRL's `RepeatSampler`.
        return num_rows // batch.prompts * batch.size * iterations

    @classmethod
    def evaluation_metrics(cls, cfg: Any) -> tuple[str, ...]:
        """Return the metrics of generated completions: rewards, and lengths in tokens."""
        return of_evaluation(*GENERATED_METRICS, *(["kl"] if cls.uses_reference(cfg) else []))

    @classmethod
    def find_problems(cls, cfg: Any) -> Iterator[tuple[str, str]]:
        """Yield (path, message) for rewards that are missing, and for keys that contradict or have no effect."""
        for rule in (reward_problems, beta_problems, vllm_problems, without_effect):
            yield from rule(cfg, cfg.trl if cfg.trl is not None else TRLKeys())

    @classmethod
    def sharding_problem(cls) -> str | None:
        """Return that completions are generated with whole models."""
        return f"doesn't go with rl: {cls.rl}, which generates with whole models; remove it to train under DDP"

    @classmethod
    def find_batch_problems(cls, cfg: Any, world_size: int) -> Iterator[tuple[str, str]]:
        """Yield (path, message) for batches that don't hold whole groups of completions."""
        yield from batch_problems(cfg, world_size)


def _check_generation(kwargs: dict[str, Any]) -> None:
    """Raise for arguments that transformers' GenerationConfig would ignore."""
    from transformers import GenerationConfig

    known = set(GenerationConfig().to_dict()) | set(inspect.signature(GenerationConfig).parameters)
    for name in kwargs:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "see transformers' GenerationConfig"
            raise ValueError(f"trl.generation_kwargs.{name}: no argument of generation; {hint}")
