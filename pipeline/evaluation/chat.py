"""Interactive chat with a policy and its reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.evaluation.generate import Answers, LocalGenerator
from pipeline.evaluation.generate_on_ray import check_sampling
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
) -> None:
    """Read prompts interactively and answer each, until an empty one or the end of the input."""
    check_sampling(options)
    subject = find_subject(run, reference, overrides, trust)
    display.stage("loading models")
    generator = LocalGenerator(subject)
    # Before the first prompt: a live line would be drawn over the input.
    display.close()
    console = open_console()
    console.print("An empty prompt ends it.")
    while prompt := _read_prompt(console):
        rows = generator.answer([prompt], options, raw)
        console.print(Answers(subject.name, subject.reference_name, tuple(rows)))


def _read_prompt(console: Console) -> str:
    try:
        return console.input("prompt> ").strip()
    except EOFError:
        return ""
