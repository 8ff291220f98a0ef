"""`prefray generate`: answers of policy and reference, side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from pipeline.errors import UserError
from pipeline.evaluation.encode_prompts import EncodedPrompt, PromptEncoder, check_lengths
from pipeline.evaluation.generate_on_ray import BATCH, SamplingOptions, check_sampling
from pipeline.evaluation.prompts import check_prompt
from pipeline.evaluation.resolve_models import Subject, find_subject
from pipeline.io.remote_models import find_models
from pipeline.reference import check_given_reference, check_models
from pipeline.reference.precision import resolve_precision
from pipeline.ui.console import Printable, table_of
from pipeline.ui.display import Display
from pipeline.ui.notebook import default_display
from strategies import inference
from strategies.models.config import learned_positions

if TYPE_CHECKING:
    import pandas

    from strategies.inference.generation import Answer

__all__ = ["Answers", "LocalGenerator", "check_towers", "generate"]

GREEDY = SamplingOptions(temperature=0.0)


@dataclass(frozen=True)
class Answers(Printable):
    """Answers of policy and reference to the same prompts."""

    policy: str
    reference: str | None
    rows: tuple[dict[str, Any], ...]
    """`prompt`, `policy`, `policy_length` in tokens, and with a reference `reference` and `reference_length`."""
    notes: tuple[str, ...] = ()
    """What of the prompts may not be as it was meant."""

    @cached_property
    def table(self) -> pandas.DataFrame:
        """One row per prompt."""
        import pandas

        return pandas.DataFrame(list(self.rows))

    def __rich__(self) -> Group:
        columns = ("prompt", "policy", *(["reference"] if self.reference is not None else []))
        rows = [[row[name] for name in columns] for row in self.rows]
        return Group(table_of(columns, rows, left=columns, show_lines=True), *map(Text, self.notes))


class LocalGenerator:
    """Generates answers with policy and reference in this process.

    Raises:
        UserError: when a model can't be loaded.
    """

    def __init__(self, subject: Subject, encoder: PromptEncoder) -> None:
        import torch

        on_gpu = torch.cuda.is_available()
        autocast = resolve_precision(subject.policy, on_gpu).autocast
        find_models(*filter(None, (subject.policy, subject.reference))).bring()
        self._vision = encoder.vision
        device, dtype = "cuda" if on_gpu else "cpu", getattr(torch, autocast) if autocast else None
        try:
            self._answerer = inference.Answerer(
                subject.policy, subject.reference, encoder.tokenizer, device, dtype, self._vision
            )
        except ValueError as error:
            raise UserError(str(error)) from error

    def answer(self, prompts: Sequence[EncodedPrompt], options: SamplingOptions) -> Iterator[dict[str, Any]]:
        """Yield the rows of `Answers`, batch by batch.

        Raises:
            UserError: for a prompt that, with its answer, exceeds the model's positions.
        """
        sampling = inference.Sampling(options.max_new_tokens, options.temperature, options.top_p)
        if (most := learned_positions(self._answerer.policy.config)) is not None:
            check_lengths(prompts, options.max_new_tokens, most)
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            pictures = [{"images": list(prompt.images)} for prompt in batch] if self._vision is not None else []
            # A seed per batch, as on Ray, so the same prompts and options give the same answers there.
            answers = self._answerer.answer([prompt.ids for prompt in batch], sampling, options.seed + start // BATCH, pictures)
            for prompt, (policy_answer, reference_answer) in zip(batch, answers, strict=True):
                yield {"prompt": prompt.shown, **_fields("policy", policy_answer), **_fields("reference", reference_answer)}


def _fields(role: str, answer: Answer | None) -> dict[str, Any]:
    return {} if answer is None else {role: answer.text, f"{role}_length": answer.length}


def check_towers(subject: Subject) -> None:
    """Raise UserError unless policy and reference take pictures, and make the same pixels of them."""
    for model in filter(None, (subject.policy, subject.reference)):
        check_models(model)
    if subject.reference is not None and subject.given_reference is not None:
        check_given_reference(subject.policy, subject.reference, subject.given_reference)


def generate(
    run: str,
    prompts: Sequence[Any],
    reference: str | None = None,
    options: SamplingOptions = GREEDY,
    raw: bool = False,
    overrides: Iterable[str] = (),
    display: Display | None = None,
    trust: bool = False,
) -> Answers:
    """Answer prompts with a policy and its reference, in this process, without Ray.

    Args:
        run: output_dir of a finished run, a model, or an adapter.
        prompts: text, which becomes a user message; lists of messages; or rows with `prompt` and the pictures that it is about
            in `image` or `images`, as `prepare` reads them, or opened.
        reference: model or adapter to compare with; by default the model that the policy was trained from.
        options: sampling options; greedy by default.
        raw: continue text as it is, without a chat template.
        overrides: `key=value` overrides of the recipe.
        display: shows stages and progress; when None, progress is shown in a notebook and nothing elsewhere.
        trust: allow code that the run's config names.

    Raises:
        UserError: as `pipeline.evaluate`, and for invalid prompts, and pictures that can't be read or taken.
    """
    check_sampling(options)
    display = display or default_display()
    # Before the models are loaded.
    checked = [check_prompt(prompt, f"prompt {number}") for number, prompt in enumerate(prompts, start=1)]
    if not checked:
        raise UserError("no prompts to answer; give some, or --file")
    subject = find_subject(str(run), reference, list(overrides), trust)
    display.stage("reading prompts")
    encoder = PromptEncoder.of(subject.policy, raw)
    encoded = encoder.encode(checked)
    if any(prompt.images for prompt in encoded):
        check_towers(subject)
    display.stage("loading models")
    generator = LocalGenerator(subject, encoder)
    display.stage("answering prompts")
    rows = []
    for row in generator.answer(encoded, options):
        rows.append(row)
        display.progress({"stage": "answer", "rows_done": len(rows), "rows_total": len(checked)})
    return Answers(subject.name, subject.reference_name, tuple(rows), tuple(encoder.notes))
