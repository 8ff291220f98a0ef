"""Interactive chat with a policy and its reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.errors import UserError
from pipeline.evaluation.encode_prompts import PromptEncoder
from pipeline.evaluation.generate import Answers, LocalGenerator, check_towers
from pipeline.evaluation.generate_on_ray import check_sampling
from pipeline.evaluation.prompts import check_prompt
from pipeline.evaluation.resolve_models import find_subject
from pipeline.ui.console import open_console

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.evaluation.generate_on_ray import SamplingOptions
    from pipeline.ui.display import Display

__all__ = ["chat"]


def chat(
    run: str,
    reference: str | None,
    options: SamplingOptions,
    raw: bool,
    overrides: Sequence[str],
    display: Display,
    trust: bool,
    images: Sequence[str] = (),
) -> None:
    """Read prompts interactively and answer each, about the same pictures, until an empty one or the end of the input."""
    check_sampling(options)
    subject = find_subject(run, reference, overrides, trust)
    encoder = PromptEncoder.of(subject.policy, raw)
    if images:
        # Before the models are loaded. The text is of no account, but a raw one has a mark for each picture.
        if not raw:
            encoder.encode([check_prompt({"prompt": "?", "images": images}, "--image")])
        check_towers(subject)
    display.stage("loading models")
    generator = LocalGenerator(subject, encoder)
    # Before the first prompt: a live line would be drawn over the input.
    display.close()
    console = open_console()
    console.print("An empty prompt ends it.")
    while prompt := _read_prompt(console):
        row = {"prompt": prompt, "images": images} if images else prompt
        try:
            rows = generator.answer(encoder.encode([check_prompt(row, "prompt")]), options)
        except UserError as error:  # of this prompt, such as one that is too long
            console.print(str(error), style="red", markup=False, highlight=False)
            continue
        console.print(Answers(subject.name, subject.reference_name, tuple(rows)))


def _read_prompt(console: Console) -> str:
    try:
        return console.input("prompt> ").strip()
    except EOFError:
        return ""
