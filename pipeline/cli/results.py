"""Commands that look at what runs have left."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pipeline.cli.running import Debug, execute

__all__ = ["report"]


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
from pipeline.cli.running import Debug, Quiet, execute
__all__ = ["merge"]
def merge(
    run: Annotated[
        str, typer.Argument(metavar="RUN|ADAPTER", help="The output_dir of a finished run, or an adapter's folder.")
    ],
        str | None,
        typer.Option("--output", metavar="DIR", help="Where the model goes; RUN/merged, or ADAPTER-merged, when not given."),
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, bfloat16 or float16, of all weights; the base's own when not given.")
    shard_size: Annotated[str, typer.Option("--shard-size", metavar="SIZE", help="Size of a file at most.")] = "5GB",
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="MODEL", help="The base model, where it isn't what the run or adapter names."),
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Don't compare the result with base and adapter.")] = False,
    quiet: Quiet = False,
    """Merge an adapter into its base model: a model that loads without PEFT, compared with base and adapter."""
        from pipeline import merge as run_merge
        from pipeline.tables import print_merged
        result = run_merge(run, output, base=base, dtype=dtype, shard_size=shard_size, verify=not no_verify, display=display)
        print_merged(result)
    execute(command, quiet, debug)
