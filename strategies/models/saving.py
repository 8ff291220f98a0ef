"""Saving of the final model: weights or adapter, tokenizer, model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from strategies.compat import tags_of
from strategies.vision.sizes import card_facts

__all__ = ["load_saved", "save_final", "write_model_card"]

TRAINED_ON = {"pair": "preference pairs", "unpaired": "labelled completions", "prompt": "prompts, judged by reward functions"}
BATCH_OF = {"pair": "pairs", "unpaired": "labelled completions", "prompt": "completions"}


def save_final(trainer: Any, processing: Any, folder: str | Path) -> Path:
    """Write the trained model as a folder that `from_pretrained` loads. Every rank must call it.

    Full fine-tuning writes safetensors with config and generation config; of an adapter only the adapter is written, to be
    loaded with `PeftModel.from_pretrained(base, folder)`. The folder also has the tokenizer with its chat template, and a
    model card.

    Args:
        processing: the tokenizer, or the processor of a model that was trained on pictures.
    """
    folder = Path(folder)
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        processing.save_pretrained(folder)
        # A pickle of this run's arguments, not meant for a published model.
        (folder / "training_args.bin").unlink(missing_ok=True)
        write_model_card(trainer, folder)
    # No rank returns before the folder is complete: the caller may read it on any of them.
    trainer.accelerator.wait_for_everyone()
    return folder


def load_saved(model: PreTrainedModel, folder: str | Path) -> None:
    """Copy the weights that `save_pretrained` wrote into a model.

    By `from_pretrained`, which alone reads the other names and shapes that transformers writes of some models, such as mixtures
    of experts and vision-language models.

    Raises:
        ValueError: if the folder lacks weights of the model.
    """
    saved, report = type(model).from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{folder} lacks {len(missing)} of the model's weights, such as {missing[0]}")
    model.load_state_dict(saved.state_dict())


def write_model_card(trainer: Any, folder: str | Path) -> None:
    """Write `README.md`: base model, data, method and final metrics."""
    path = Path(folder) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_card(trainer))


def _card(trainer: Any) -> str:
    args = trainer.args
    adapter = isinstance(trainer.model, PeftModel)
    base = trainer.base_model or getattr(trainer.model.config, "name_or_path", "") or "a model given in code"
    batch = trainer.get_total_train_batch_size(args)
    facts = {
        "Base model": base,
        "Trained": "an adapter (PEFT)" if adapter else "all weights",
        **_method(trainer),
        "Data": ", ".join(trainer.dataset_tags) or "rows given in code",
        **card_facts(None if trainer.vision is None else trainer.vision.processor),
        "Learning rate": f"{args.learning_rate:g}, {args.alternate_lr_scheduler_type or args.lr_scheduler_type.value}",
        "Global batch": f"{batch} {BATCH_OF[trainer.batch_kind]}",
        "Steps": f"{trainer.state.global_step} ({trainer.state.epoch or 0:.2f} epochs)",
        "Seed": args.seed,
    }
    lines = [f"| {name} | {value} |" for name, value in facts.items()]
    metrics = [f"| {name} | {value:.4g} |" for name, value in _last_metrics(trainer.state.log_history).items()]
    front = ["---", *(["library_name: peft"] if adapter else ["library_name: transformers"]), "tags:"]
    front += [f"- {tag}" for tag in tags_of(trainer)] + ["---"]
    body = [
        "",
        f"# {Path(base).name} after {trainer.rl.upper()}",
        "",
        f"Trained on {TRAINED_ON[trainer.batch_kind]}.",
        "",
        "| | |",
        "|---|---|",
    ]
    tail = ["", "| last value of | |", "|---|---|", *metrics] if metrics else []
    return "\n".join([*front, *body, *lines, *tail]) + "\n"


def _method(trainer: Any) -> dict[str, Any]:
    args = trainer.args
    losses = args.loss_type if isinstance(args.loss_type, list) else [args.loss_type]
    facts = {"Method": f"{trainer.rl}, loss {' + '.join(losses)}, beta {args.beta}"}
    if getattr(args, "label_smoothing", 0):
        facts["Label smoothing"] = args.label_smoothing
    longest = getattr(args, "max_length", None)
    return {**facts, "Longest sequence": f"{longest} tokens"} if longest is not None else facts


def _last_metrics(history: list[dict[str, float]]) -> dict[str, float]:
    wanted = (
        "loss",
        "reward",
        "kl",
        "rewards/accuracies",
        "rewards/margins",
        "eval_loss",
        "eval_reward",
        "eval_rewards/accuracies",
        "eval_rewards/margins",
    )
    last: dict[str, float] = {}
    for entry in history:
        last.update({name: entry[name] for name in wanted if isinstance(entry.get(name), (int, float))})
    return last
