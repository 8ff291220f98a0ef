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
