"""Answers of policy and reference to prompts, by Ray Data actors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.actors import Work, run_on_actors
from pipeline.errors import UserError
from pipeline.evaluation.actor import AnswerActor, AnswerJob

if TYPE_CHECKING:
    import pandas

    from pipeline.evaluation.subject import Subject

__all__ = ["BATCH", "Prompt", "SamplingOptions", "answer_prompts", "check_sampling"]

BATCH = 8
"""Prompts that are answered together: fixed, so that answers don't depend on the number of actors."""


@dataclass(frozen=True)
class SamplingOptions:
    """How answers are drawn; `temperature: 0` is greedy."""

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


def check_sampling(options: SamplingOptions) -> None:
    """Raises UserError for numbers that no answer can be drawn by."""
    if options.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens: must be at least 1, got {options.max_new_tokens}")
    if not options.temperature >= 0:
        raise UserError(f"--temperature: must be 0 (greedy) or more, got {options.temperature:g}")
    if not 0 < options.top_p <= 1:
        raise UserError(f"--top-p: must be above 0 and at most 1, got {options.top_p:g}")


@dataclass(frozen=True)
class Prompt:
    """What is asked."""

    ids: list[int]
    shown: str
    """For a person."""
    given: Any
    """Text or messages, as reward functions are given it."""
    source: str = ""
    columns: dict[str, Any] | None = None
    """Other columns of its row."""


def answer_prompts(
    subject: Subject,
    prompts: Sequence[Prompt],
    options: SamplingOptions,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> pandas.DataFrame:
    """One row per prompt, in order: `prompt`, `source`, the answers `policy` and `reference` with their `_ids`, `_length` and
    `_cut` (had no end after `max_new_tokens`), and `logratio`.

    Raises:
        UserError, RunFailed: as `pipeline.actors.run_on_actors`.
    """
    import pandas

    from pipeline.reference.precision import resolve_precision
    from pipeline.reference.scoring import actor_plan

    batches = [prompts[start : start + BATCH] for start in range(0, len(prompts), BATCH)]
    actors = actor_plan(subject.policy, most=len(batches))
    job = AnswerJob(
        policy=subject.policy,
        reference=subject.reference,
        precision=resolve_precision(subject.policy, actors.use_gpu),
        use_gpu=actors.use_gpu,
        threads=max(1, int(actors.resources["CPU"])),
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        longest=max(len(prompt.ids) for prompt in prompts) + 2 * options.max_new_tokens + 2,
    )
    tasks = {
        str(place): {"place": place, "prompts": [prompt.ids for prompt in batch], "seed": options.seed + place}
        for place, batch in enumerate(batches)
    }
    work = Work("answering prompts", "lower --max-new-tokens, or ray.score.num_actors")
    found: dict[int, list[dict[str, Any]]] = {}
    for result in run_on_actors(AnswerActor, job, tasks, actors, work):
        found[result["place"]] = result["answers"]
        if progress is not None:
            progress({"stage": "answer", "rows_done": sum(map(len, found.values())), "rows_total": len(prompts)})
    answers = [answer for place in range(len(batches)) for answer in found[place]]
    return pandas.DataFrame([_row(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)])


def _row(prompt: Prompt, answer: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"prompt": prompt.shown, "source": prompt.source}
    for who in ("policy", "reference"):
        if (one := answer[who]) is not None:
            row |= {who: one["text"], f"{who}_ids": one["ids"], f"{who}_length": one["length"], f"{who}_cut": one["is_cut"]}
    return {**row, "logratio": answer["logratio"]}
