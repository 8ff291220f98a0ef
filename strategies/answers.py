"""Answers to a few prompts while a run goes on, for a person to look at, and their length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from strategies.generation import Sampling, generate

__all__ = ["Answers"]


class Answers:
    """What policy and reference (if any) answer, at each evaluation, to the first prompts of the evaluation rows.

    The table goes to `{output_dir}/generations/step-000010.jsonl` (prompt, policy, reference), and stays in
    `trainer.generations`. Answers are greedy. Rank 0 writes; under sharding every rank generates, since each holds a
    part.
    """

    def __init__(self, trainer: Any, rows: int = 4, max_new_tokens: int = 64) -> None:
        self.trainer = trainer
        self.rows = rows
        self.max_new_tokens = max_new_tokens

    def add_to(self, logs: dict[str, float]) -> None:
        """Answer, and add the mean length of the answers, where these are the logs of the first (or only) evaluation set."""
        rows = self.trainer.eval_dataset
        prefix = f"eval_{next(iter(rows))}_" if isinstance(rows, dict) else "eval_"
        if f"{prefix}loss" in logs:
            logs[f"{prefix}answer_length"] = self.sample()

    def sample(self) -> float:
        """Generate and write the table; returns the mean length of the policy's answers in tokens. Every rank must call it."""
        trainer = self.trainer
        sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
        table, lengths = [], []
        if trainer.is_world_process_zero() or sharded:
            for prompt_ids in self._prompts():
                answers = self._answers(prompt_ids)
                table.append(
                    {"prompt": trainer._tokenizer.decode(prompt_ids), **{name: text for name, (text, _) in answers.items()}}
                )
                lengths.append(answers["policy"][1])
            trainer.generations = table
        if trainer.is_world_process_zero():
            folder = Path(trainer.args.output_dir) / "generations"
            folder.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in table]
            (folder / f"step-{trainer.state.global_step:06d}.jsonl").write_text("".join(lines))
        return broadcast_object_list([sum(lengths) / max(len(lengths), 1)])[0]

    def _prompts(self) -> list[list[int]]:
        rows = self.trainer.eval_dataset
        rows = next(iter(rows.values())) if isinstance(rows, dict) else rows
        found: list[list[int]] = []
        for row in rows if rows is not None else []:
            if len(found) == self.rows:
                break
            if row["prompt_ids"] not in found:
                found.append(row["prompt_ids"])
        return found

    def _answers(self, prompt_ids: list[int]) -> dict[str, tuple[str, int]]:
        """Text and length of the policy's answer, and of the reference's."""
        from strategies.reference import as_reference

        trainer = self.trainer
        policy = trainer.accelerator.unwrap_model(trainer.model)
        answers = {"policy": self._generate(policy, prompt_ids)}
        if trainer.uses_reference:
            reference, context = as_reference(trainer)
            with context:
                answers["reference"] = self._generate(reference, prompt_ids)
        return answers

    def _generate(self, model: Any, prompt_ids: list[int]) -> tuple[str, int]:
        greedy = Sampling(self.max_new_tokens, temperature=0)
        was_training = model.training
        model.eval()
        try:
            answer = generate(model, self.trainer._tokenizer, [prompt_ids], greedy, device=self.trainer.accelerator.device)[0]
        finally:
            model.train(was_training)
        return answer.text, answer.length
