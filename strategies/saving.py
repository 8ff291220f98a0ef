"""What a finished run leaves: weights or adapter, tokenizer, model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel

__all__ = ["save_final", "write_model_card"]

TRAINED_ON = {"pair": "preference pairs", "unpaired": "labelled completions", "prompt": "prompts, judged by reward functions"}
BATCH_OF = {"pair": "pairs", "unpaired": "labelled completions", "prompt": "completions"}


def save_final(trainer: Any, tokenizer: Any, folder: str | Path) -> Path:
    """Write the trained model as a folder that `from_pretrained` loads; every rank must call it.

    Full fine-tuning leaves safetensors with config and generation config; an adapter leaves itself, to be loaded with
    `PeftModel.from_pretrained(base, folder)`. The tokenizer with its chat template and a model card stand beside it.
    """
    folder = Path(folder)
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        tokenizer.save_pretrained(folder)
        # A pickle of this run's arguments: of use in a checkpoint, not in a model that is handed on.
        (folder / "training_args.bin").unlink(missing_ok=True)
        write_model_card(trainer, folder)
    trainer.accelerator.wait_for_everyone()
    return folder


def write_model_card(trainer: Any, folder: str | Path) -> None:
    """Write `README.md`: what the model was trained from, on what, how, and to which metrics."""
    path = Path(folder) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_card(trainer))


def _card(trainer: Any) -> str:
    args = trainer.args
    adapter = isinstance(trainer.model, PeftModel)
    base = trainer.base_model or getattr(trainer.model.config, "_name_or_path", "") or "a model given in code"
    batch = trainer.get_total_train_batch_size(args)
    facts = {
        "Base model": base,
        "Trained": "an adapter (PEFT)" if adapter else "all weights",
        **_method(trainer),
        "Data": ", ".join(trainer.dataset_tags) or "rows given in code",
        "Learning rate": f"{args.learning_rate:g}, {args.alternate_lr_scheduler_type or args.lr_scheduler_type.value}",
        "Global batch": f"{batch} {BATCH_OF[trainer.batch_kind]}",
        "Steps": f"{trainer.state.global_step} ({trainer.state.epoch or 0:.2f} epochs)",
        "Seed": args.seed,
    }
    lines = [f"| {name} | {value} |" for name, value in facts.items()]
    metrics = [f"| {name} | {value:.4g} |" for name, value in _last_metrics(trainer.state.log_history).items()]
    front = ["---", *(["library_name: peft"] if adapter else ["library_name: transformers"]), "tags:"]
    front += [f"- {tag}" for tag in trainer._tag_names] + ["---"]
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
    found: dict[str, float] = {}
    for entry in history:
        found.update({name: entry[name] for name in wanted if isinstance(entry.get(name), (int, float))})
    return found
