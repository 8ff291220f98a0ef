"""Commands about what runs have left: evaluate it, let it answer, merge it, show it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli.running import Debug, Overrides, Quiet, execute

__all__ = ["evaluate", "generate", "merge", "report"]

Model = Annotated[
    str,
    typer.Argument(
        metavar="RUN|MODEL", help="output_dir of a finished run; a model: folder, .gguf, hub id; or an adapter's folder."
    ),
]
Against = Annotated[
    str | None,
    typer.Option(
        "--reference", metavar="MODEL", help="Compare with this model or adapter; a run's own reference when not set."
    ),
]
Tokens = Annotated[int, typer.Option("--max-new-tokens", help="Most tokens of an answer.")]
TopP = Annotated[float, typer.Option("--top-p", help="Draw from the likeliest tokens that make up this part of probability.")]
Seed = Annotated[int, typer.Option("--seed", help="Of what is drawn.")]
Json = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write everything there; - prints it, and no table.")]


def evaluate(
    run: Model,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="PATH", help="Pairs to evaluate on: file, folder or hub id; the run's evaluation rows."),
    ] = None,
    type_: Annotated[str | None, typer.Option("--type", help="Dataset type of --data; TRL's own shapes when not set.")] = None,
    split: Annotated[str | None, typer.Option("--split", help="Split of --data, or a slice of it: test, train[:1000].")] = None,
    reference: Against = None,
    reward: Annotated[
        list[str] | None,
        typer.Option("--reward", metavar="FUNCTION", help="Judge answers by module.function, as GRPO's reward functions."),
    ] = None,
    answers: Annotated[int, typer.Option("--answers", help="Prompts to answer; 0 for none.")] = 64,
    max_new_tokens: Tokens = 128,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy; KL is estimated at 1 only.")] = 1.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    confidence: Annotated[float, typer.Option("--confidence", help="Of the bootstrapped intervals.")] = 0.95,
    overrides: Overrides = None,
    json_file: Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Evaluate a policy against its reference: accuracies and margins of pairs; length, KL and win rates of answers.

    An adapter is compared with its base. Log-probabilities are computed by actors and kept, so a second time costs nothing.
    """

    def command(display: Any) -> None:
        from pipeline import evaluate as run_evaluation
        from pipeline.evaluation.answering import SamplingOptions
        from pipeline.evaluation.tables import print_evaluation

        _check_writable(json_file)
        found = run_evaluation(
            run,
            data=data or (),
            type=type_,
            split=split,
            reference=reference,
            rewards=reward or (),
            answers=answers,
            options=SamplingOptions(max_new_tokens, temperature, top_p, seed),
            confidence=confidence,
            overrides=overrides or (),
            display=display,
        )
        display.close()
        if json_file != "-":
            print_evaluation(found)
        _write(json_file, found.as_json())

    execute(command, quiet, debug)


def generate(
    run: Model,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PROMPT]...", help="Prompts; without any they are asked for, or read from stdin."),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file", metavar="FILE", help="Prompts: lines of text; .jsonl or .json with text, messages, or `prompt`."
        ),
    ] = None,
    reference: Against = None,
    max_new_tokens: Tokens = 128,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.")] = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Continue text as it stands, without the chat template.")] = False,
    overrides: Overrides = None,
    json_file: Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what a policy and its reference answer to the same prompts, side by side."""

    def command(display: Any) -> None:
        from pipeline import generate as run_generation
        from pipeline.errors import UserError
        from pipeline.evaluation.answering import SamplingOptions
        from pipeline.evaluation.prompts import read_prompts
        from pipeline.evaluation.tables import print_answers, talk

        _check_writable(json_file)
        options = SamplingOptions(max_new_tokens, temperature, top_p, seed)
        if prompts and file is not None:
            raise UserError("--file: prompts were given as arguments too; give one of them")
        given: list[Any] = list(prompts or []) if file is None else read_prompts(file)
        if not given and sys.stdin.isatty():
            if json_file is not None:
                raise UserError("--json: is for prompts that are given at once; give some, or --file")
            return talk(run, reference, options, raw, overrides or (), display)
        if not given:
            given = [line for line in sys.stdin.read().splitlines() if line.strip()]
        found = run_generation(run, given, reference, options, raw, overrides or (), display)
        display.close()
        if json_file != "-":
            print_answers(found)
        _write(json_file, {"policy": found.policy, "reference": found.reference, "answers": list(found.rows)})
        return None

    execute(command, quiet, debug)


def merge(
    run: Annotated[
        str, typer.Argument(metavar="RUN|ADAPTER", help="The output_dir of a finished run, or an adapter's folder.")
    ],
    output: Annotated[
        str | None,
        typer.Option("--output", metavar="DIR", help="Where the model goes; RUN/merged, or ADAPTER-merged, when not given."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, bfloat16 or float16, of all weights; the base's own when not given.")
    ] = None,
    shard_size: Annotated[str, typer.Option("--shard-size", metavar="SIZE", help="Size of a file at most.")] = "5GB",
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="MODEL", help="The base model, where it isn't what the run or adapter names."),
    ] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Don't compare the result with base and adapter.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Merge an adapter into its base model: a model that loads without PEFT, compared with base and adapter."""

    def command(display: Any) -> None:
        from pipeline import merge as run_merge
        from pipeline.tables import print_merged

        result = run_merge(run, output, base=base, dtype=dtype, shard_size=shard_size, verify=not no_verify, display=display)
        display.close()
        print_merged(result)

    execute(command, quiet, debug)


def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The output_dir of a run or a sweep, or a trial's folder in one.")],
    output: Annotated[
        str | None, typer.Option("--output", metavar="FILE", help="The file to write; report.html in RUN when not given.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Write the page of a run or a sweep again: charts, answers, data, what happened, config."""

    def command(display: Any) -> None:
        from pipeline import write_report

        display.stage("writing the report")
        where = write_report(run, output)
        display.close()
        print(where)

    execute(command, quiet=True, debug=debug)


def _check_writable(where: str | None) -> None:
    """Say before anything is computed what couldn't be written after it."""
    from pipeline.errors import UserError

    if where in (None, "-"):
        return
    path = Path(str(where)).absolute()
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"--json: {where!r} can't be written; give a file in a folder that exists")


def _write(where: str | None, values: dict[str, Any]) -> None:
    from pipeline.errors import UserError

    if where is None:
        return
    text = json.dumps(values, indent=2, ensure_ascii=False)
    if where == "-":
        print(text)
        return
    try:
        Path(where).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json: {where!r} can't be written: {error.strerror}") from error
