"""`prefray generate`: the answers of policy and reference, side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import TYPE_CHECKING, Any

from pipeline.display import Display
from pipeline.errors import UserError
from pipeline.evaluation.answering import BATCH, SamplingOptions, check_sampling
from pipeline.evaluation.prompts import Given, check_lengths, check_prompt, shown, token_ids
from pipeline.evaluation.subject import Subject, find_subject
from pipeline.notebook import default_display

if TYPE_CHECKING:
    import pandas

    from strategies.generation import Answer

__all__ = ["Answers", "Speakers", "generate"]

GREEDY = SamplingOptions(temperature=0.0)


@dataclass(frozen=True)
class Answers:
    """What policy and reference answer to the same prompts."""

    policy: str
    reference: str | None
    rows: tuple[dict[str, Any], ...]
    """`prompt`, `policy`, `policy_length` in tokens, and of the reference the same, where there is one."""

    @cached_property
    def table(self) -> pandas.DataFrame:
        """One row per prompt."""
        import pandas

        return pandas.DataFrame(list(self.rows))

    def _repr_html_(self) -> str:
        columns = ["prompt", "policy", *(["reference"] if self.reference is not None else [])]
        head = "".join(f"<th style='text-align:left'>{name}</th>" for name in columns)
        style = "style='text-align:left;vertical-align:top;white-space:pre-wrap'"
        body = "".join(
            "<tr>" + "".join(f"<td {style}>{escape(row[name])}</td>" for name in columns) + "</tr>" for row in self.rows
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


class Speakers:
    """Policy and reference in the memory of this process.

    Raises:
        UserError: when a model can't be loaded.
    """

    def __init__(self, subject: Subject) -> None:
        import torch

        from pipeline.reference.actor import silence_libraries
        from pipeline.reference.precision import resolve_precision
        from strategies.generation import Answerer
        from strategies.tokenizer import load_tokenizer

        silence_libraries()
        on_gpu = torch.cuda.is_available()
        autocast = resolve_precision(subject.policy, on_gpu).autocast
        self.subject = subject
        try:
            self.tokenizer = load_tokenizer(subject.policy)
            device, dtype = "cuda" if on_gpu else "cpu", getattr(torch, autocast) if autocast else None
            self._answerer = Answerer(subject.policy, subject.reference, self.tokenizer, device, dtype)
        except ValueError as error:
            raise UserError(str(error)) from error

    def answer(self, prompts: Sequence[Given], options: SamplingOptions, raw: bool = False) -> Iterator[dict[str, Any]]:
        """Yield rows of `Answers`, batch after batch.

        Raises:
            UserError: for a prompt that, with its answer, is longer than the model has positions.
        """
        from strategies.generation import Sampling, learned_positions

        sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p)
        ids = token_ids(prompts, self.tokenizer, raw)
        if (most := learned_positions(self._answerer.policy.config)) is not None:
            check_lengths(ids, options.max_new_tokens, most)
        for start in range(0, len(prompts), BATCH):
            both = self._answerer.answer(ids[start : start + BATCH], sampling, options.seed + start // BATCH)
            for prompt, (own, other) in zip(prompts[start : start + BATCH], both, strict=True):
                yield {"prompt": shown(prompt), **_fields("policy", own), **_fields("reference", other)}


def _fields(who: str, answer: Answer | None) -> dict[str, Any]:
    return {} if answer is None else {who: answer.text, f"{who}_length": answer.length}


def generate(
    run: str,
    prompts: Sequence[Given],
    reference: str | None = None,
    options: SamplingOptions = GREEDY,
    raw: bool = False,
    overrides: Iterable[str] = (),
    display: Display | None = None,
) -> Answers:
    """Answer prompts with a policy and its reference, in this process, without Ray.

    Args:
        run: output_dir of a finished run, a model, or an adapter.
        prompts: each text, which becomes a user's message, or a list of messages.
        reference: model or adapter to answer beside it, in place of what the policy was trained from.
        options: how answers are drawn; greedily when not given.
        raw: continue text as it stands, without a chat template.
        overrides: `key=value`, of the recipe.
        display: shows what is being done; when None, progress is shown in a notebook and nothing elsewhere.

    Raises:
        UserError: as `pipeline.evaluate`, and for prompts of another shape.
    """
    check_sampling(options)
    display = display or default_display()
    given = [check_prompt(prompt, f"prompt {number}") for number, prompt in enumerate(prompts, start=1)]
    if not given:
        raise UserError("no prompts to answer; give some, or --file")
    subject = find_subject(str(run), reference, overrides)
    display.stage("loading models")
    speakers = Speakers(subject)
    display.stage("answering prompts")
    rows = []
    for row in speakers.answer(given, options, raw):
        rows.append(row)
        display.progress({"stage": "answer", "rows_done": len(rows), "rows_total": len(given)})
    return Answers(subject.name, subject.reference_name, tuple(rows))
