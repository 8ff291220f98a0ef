"""Commands for finished runs and models: evaluate, generate, merge, report."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli.execution import Debug, Overrides, Quiet, execute, print_result

__all__ = ["evaluate", "generate", "merge", "report"]

Model = Annotated[
    str,
    typer.Argument(
        metavar="RUN|MODEL", help="output_dir of a finished run; a model: folder, .gguf, hub id; an adapter's folder; or a URI."
    ),
]
Against = Annotated[
    str | None,
    typer.Option("--reference", metavar="MODEL", help="Compare with this model or adapter; the run's reference when not set."),
]
Tokens = Annotated[int, typer.Option("--max-new-tokens", help="Most tokens of an answer.")]
TopP = Annotated[float, typer.Option("--top-p", help="Nucleus sampling: probability mass of the tokens to sample from.")]
Seed = Annotated[int, typer.Option("--seed", help="Random seed of sampling.")]
Trust = Annotated[
    bool,
    typer.Option("--trust", help="Run code that the run's config names: plugins, reward functions, the model repository's."),
]
Json = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help="Write the results as JSON; - prints them instead of the table.")
]


def evaluate(
    run: Model,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="PATH", help="Pairs to evaluate on: file, folder or hub id; the run's evaluation rows."),
    ] = None,
    type_: Annotated[str | None, typer.Option("--type", help="Dataset type of --data; TRL's formats when not set.")] = None,
    split: Annotated[str | None, typer.Option("--split", help="Split of --data, or a slice of it: test, train[:1000].")] = None,
    reference: Against = None,
    reward: Annotated[
        list[str] | None,
        typer.Option("--reward", metavar="FUNCTION", help="Score answers by module.function, a reward function as GRPO's."),
    ] = None,
    answers: Annotated[int, typer.Option("--answers", help="Prompts to answer; 0 for none.")] = 64,
    max_new_tokens: Tokens = 128,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy; KL is estimated at 1 only.")] = 1.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    confidence: Annotated[float, typer.Option("--confidence", help="Confidence level of the bootstrapped intervals.")] = 0.95,
    overrides: Overrides = None,
    trust: Trust = False,
    json_file: Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Evaluate a policy against its reference: accuracies and margins of pairs; length, KL and win rates of answers.

    An adapter is compared with its base. Log-probabilities are computed by actors and cached for the next time.
    """

    def command(display: Any) -> None:
        from pipeline import evaluate as run_evaluation
        from pipeline.evaluation.generate_on_ray import SamplingOptions

        _check_writable(json_file)
        result = run_evaluation(
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
            trust=trust,
        )
        display.close()
        if json_file != "-":
            print_result(result, least=140)
        _write(json_file, result.as_json())

    execute(command, quiet, debug)


def generate(
    run: Model,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PROMPT]...", help="Prompts; without any, interactive input or stdin."),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file", metavar="FILE", help="Prompts: lines of text; .jsonl or .json with text, messages, or `prompt`."
        ),
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(
            "--image", metavar="PATH", help="A picture that the prompts are about: path or URI; several times for several."
        ),
    ] = None,
    reference: Against = None,
    max_new_tokens: Tokens = 128,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.")] = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text without the chat template.")] = False,
    overrides: Overrides = None,
    trust: Trust = False,
    json_file: Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show answers of a policy and its reference to the same prompts, side by side."""

    def command(display: Any) -> None:
        from pipeline import generate as run_generation
        from pipeline.errors import UserError
        from pipeline.evaluation.chat import chat
        from pipeline.evaluation.generate_on_ray import SamplingOptions

        _check_writable(json_file)
        options = SamplingOptions(max_new_tokens, temperature, top_p, seed)
        inputs = _prompts(prompts, file, image)
        if not inputs and sys.stdin.isatty():
            if json_file is not None:
                raise UserError("--json: is for prompts that are given at once; give some, or --file")
            return chat(run, reference, options, raw, overrides or (), display, trust, image or ())
        if not inputs:
            inputs = [line for line in sys.stdin.read().split("\n") if line.strip()]
        if image:
            inputs = [{"prompt": prompt, "images": image} for prompt in inputs]
        result = run_generation(run, inputs, reference, options, raw, overrides or (), display, trust)
        display.close()
        if json_file != "-":
            print_result(result, least=140)
        found = {"policy": result.policy, "reference": result.reference, "answers": list(result.rows)}
        _write(json_file, {**found, "notes": list(result.notes)})
        return None

    execute(command, quiet, debug)


def merge(
    run: Annotated[
        str, typer.Argument(metavar="RUN|ADAPTER", help="The output_dir of a finished run, or an adapter's folder.")
    ],
    output: Annotated[
        str | None,
        typer.Option(
            "--output", metavar="DIR", help="Folder of the merged model; RUN/merged, or ADAPTER-merged, when not set."
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, bfloat16 or float16, of all weights; the base's when not set.")
    ] = None,
    shard_size: Annotated[str, typer.Option("--shard-size", metavar="SIZE", help="Maximum size of a file.")] = "5GB",
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="MODEL", help="The base model, if it isn't the one that the run or adapter names."),
    ] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Don't compare the result with base and adapter.")] = False,
    trust: Trust = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Merge an adapter into its base model: a model that loads without PEFT, compared with base and adapter."""

    def command(display: Any) -> None:
        from pipeline import merge as run_merge

        result = run_merge(
            run, output, base=base, dtype=dtype, shard_size=shard_size, verify=not no_verify, display=display, trust=trust
        )
        display.close()
        print_result(result)

    execute(command, quiet, debug)


def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The output_dir of a run or a sweep, or a trial's folder in one.")],
    output: Annotated[
        str | None, typer.Option("--output", metavar="FILE", help="The file to write; report.html in RUN when not set.")
    ] = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="Load the plugins that its config names, if its keys need them.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Write the page of a run or a sweep again: charts, answers, data, what happened, config."""

    def command(display: Any) -> None:
        from pipeline import write_report

        display.stage("writing the report")
        page = write_report(run, output, trust)
        display.close()
        print(page)

    execute(command, quiet=True, debug=debug)


def _prompts(prompts: list[str] | None, file: Path | None, image: list[str] | None) -> list[Any]:
    """Return the prompts of the command line; none where they are asked for or read from standard input."""
    from pipeline.errors import UserError
    from pipeline.evaluation.prompts import read_prompts

    if prompts and file is not None:
        raise UserError("--file: prompts were given as arguments too; give one of them")
    if image and file is not None:
        raise UserError("--image: is for prompts as arguments or input; rows of --file name their own (image, images)")
    return list(prompts or []) if file is None else read_prompts(file)


def _check_writable(file: str | None) -> None:
    """Raise UserError for an output that can't be written, before anything is computed."""
    from pipeline.errors import UserError

    if file in (None, "-"):
        return
    # Absolute, so that the parent of a bare name is the current directory.
    path = Path(str(file)).absolute()
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"--json: {file!r} can't be written; give a file in a folder that exists")


def _write(file: str | None, values: dict[str, Any]) -> None:
    from pipeline.errors import UserError

    if file is None:
        return
    text = json.dumps(values, indent=2, ensure_ascii=False)
    if file == "-":
        print(text)
        return
    try:
        Path(file).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json: {file!r} can't be written: {error.strerror}") from error
