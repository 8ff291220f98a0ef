"""Answers to a few prompts at each evaluation, for the user to read, and their length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# The package, whose names are lazy: its modules import torch.
from strategies import inference
from strategies.media import PICTURES
from strategies.vision.images import picture_key

__all__ = ["NEW_TOKENS", "EvalGenerations"]

NEW_TOKENS = 64
"""Maximum tokens of an answer. Drivers read it, so this module must load without torch."""


class EvalGenerations:
    """Greedy answers of policy and reference (if any), at each evaluation, to the first prompts of the evaluation rows.

    The table is written to `{output_dir}/generations/step-000010.jsonl` (prompt, policy, reference), and kept in
    `trainer.generations`. Rank 0 writes; under sharding every rank generates, since each holds a part of the model.
    """

    def __init__(self, trainer: Any, rows: int = 4, max_new_tokens: int = NEW_TOKENS) -> None:
        self.trainer = trainer
        self.rows = rows
        self.max_new_tokens = max_new_tokens

    def add_to(self, logs: dict[str, float]) -> None:
        """Generate answers and add their mean length to the logs of the first (or only) evaluation set."""
        rows = self.trainer.eval_dataset
        prefix = f"eval_{next(iter(rows))}_" if isinstance(rows, dict) else "eval_"
        # Other records are logged in evaluation mode too: of other evaluation sets, and of the end of training.
        if f"{prefix}loss" in logs:
            logs[f"{prefix}answer_length"] = self.sample()

    def sample(self) -> float:
        """Generate and write the table; return the mean length of the policy's answers in tokens. Every rank must call it."""
        from accelerate.utils import broadcast_object_list

        trainer = self.trainer
        sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
        table, lengths = [], []
        if trainer.is_world_process_zero() or sharded:
            for row in self._prompts():
                answers = self._answers(row)
                table.append({"prompt": self._shown(row), **{name: text for name, (text, _) in answers.items()}})
                lengths.append(answers["policy"][1])
            trainer.generations = table
        if trainer.is_world_process_zero():
            folder = Path(trainer.args.output_dir) / "generations"
            folder.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in table]
            (folder / f"step-{trainer.state.global_step:06d}.jsonl").write_text("".join(lines))
        # Ranks that generate nothing have no lengths, and log too: all take rank 0's mean.
        return broadcast_object_list([sum(lengths) / max(len(lengths), 1)])[0]

    def _prompts(self) -> list[dict[str, Any]]:
        """Return the first rows of different prompts: their ids and pictures."""
        rows = self.trainer.eval_dataset
        rows = next(iter(rows.values())) if isinstance(rows, dict) else rows
        prompts: dict[Any, dict[str, Any]] = {}
        for row in rows if rows is not None else []:
            if len(prompts) == self.rows:
                break
            # Data sets have several pairs of one prompt, to which the greedy answer is the same.
            key = (*row["prompt_ids"], picture_key(row))
            prompts.setdefault(key, {name: row[name] for name in ("prompt_ids", *PICTURES) if name in row})
        return list(prompts.values())

    def _shown(self, row: dict[str, Any]) -> str:
        """Return the text of a prompt, each picture as one token, whatever number stands for it."""
        trainer, ids = self.trainer, row["prompt_ids"]
        token = trainer.vision.image_token if trainer.vision is not None else None
        runs = (one for one, before in zip(ids, [None, *ids][:-1], strict=True) if one != token or before != token)
        return trainer.text_tokenizer.decode(list(runs))

    def _answers(self, row: dict[str, Any]) -> dict[str, tuple[str, int]]:
        """Return text and length of the policy's answer, and of the reference's."""
        trainer = self.trainer
        # DDP's wrapper has no `generate`.
        policy = trainer.accelerator.unwrap_model(trainer.model)
        answers = {"policy": self._generate(policy, row)}
        if trainer.uses_reference:
            reference, context = inference.as_reference(trainer)
            with context:
                answers["reference"] = self._generate(reference, row)
        return answers

    def _generate(self, model: Any, row: dict[str, Any]) -> tuple[str, int]:
        trainer = self.trainer
        shown = {"pictures": [row], "vision": trainer.vision} if trainer.vision is not None else {}
        greedy = inference.Sampling(self.max_new_tokens, temperature=0)
        was_training = model.training
        model.eval()
        try:
            answer = inference.generate(
                model, trainer.text_tokenizer, [row["prompt_ids"]], greedy, device=trainer.accelerator.device, **shown
            )[0]
        finally:
            # `MetricsMixin.log` and TRL's decide by this mode whether a record is an evaluation's.
            model.train(was_training)
        return answer.text, answer.length
