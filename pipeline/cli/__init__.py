"""The `prefray` command, which is `python -m pipeline` too."""

from __future__ import annotations

import gc

import typer

from pipeline.cli import clusters, inspection, manifests, models, recipes, runs
from pipeline.cli.execution import quiet_libraries
from pipeline.cli.trials import trials

__all__ = ["app", "quiet_libraries", "main"]

OBJECTS_PER_COLLECTION = 50_000
"""Threshold of garbage collection: with Python's default, 700, collections take a quarter of the time of imports."""

app = typer.Typer(
    help="Preference training on Ray: pairs in, an aligned model out.",
    no_args_is_help=True,
    add_completion=False,
    # Tracebacks are printed by `execute`, with --debug alone.
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (
    runs.train,
    runs.tune,
    runs.prepare,
    runs.score,
    inspection.inspect,
    models.evaluate,
    models.generate,
    models.merge,
    models.report,
    clusters.doctor,
    clusters.submit,
    recipes.convert,
    runs.schema,
):
    app.command()(command)
app.add_typer(trials, name="trials")
app.add_typer(clusters.jobs, name="jobs")
app.add_typer(manifests.manifest, name="manifest")
app.add_typer(recipes.recipes, name="recipes")


def main() -> None:
    """Run `prefray`, or `python -m pipeline`."""
    # Before a command imports its libraries.
    gc.set_threshold(OBJECTS_PER_COLLECTION)
    app(prog_name="prefray")
