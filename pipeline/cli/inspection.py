"""The command `inspect`: what is odd about a recipe's data."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from pipeline.cli.execution import Debug, Overrides, Quiet, Recipe, execute, load, print_result

__all__ = ["inspect"]


def inspect(
    recipe: Recipe,
    overrides: Overrides = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against", metavar="FILE", help="A benchmark's file, whose 8-grams are looked for in the rows; repeatable."
        ),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", metavar="FILE", help="The page; inspect.html beside the columns when not set.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print findings and quantiles as JSON.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Look for what is odd in the data before anything is trained: findings, a page, and columns to select rows by.

    Prepares the data unless they are cached; cached scores are used, and none are computed.
    """

    def command(display: Any) -> None:
        from pipeline import inspect as run
        from pipeline import write_inspection
        from pipeline.config.paths import absolute_paths

        cfg = absolute_paths(load(recipe, overrides))
        for note in cfg.notes:
            display.note(note)
        display.stage("inspecting the data")
        found = run(cfg, against or (), progress=display.progress)
        display.stage("writing the page")
        page = write_inspection(found, cfg, output)
        display.close()
        if as_json:
            print(json.dumps({**found.as_json(), "page": str(page)}, indent=2, ensure_ascii=False))
            return
        print_result(found, least=120)
        print(page)

    execute(command, quiet, debug)
