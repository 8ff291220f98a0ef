"""Commands that look at what runs have left."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pipeline.cli.running import Debug, Quiet, execute

__all__ = ["merge"]


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
