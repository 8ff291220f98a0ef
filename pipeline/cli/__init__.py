"""The `prefray` command, which is `python -m pipeline` too."""

from __future__ import annotations

import gc

import typer

from pipeline.cli import clusters, manifests, models, recipes, runs
from pipeline.cli.running import hide_what_nobody_can_act_on

__all__ = ["app", "hide_what_nobody_can_act_on", "main"]

OBJECTS_PER_COLLECTION = 50_000
"""Python's own 700 make it look for garbage so often while libraries are imported that it takes a fourth of the time."""

app = typer.Typer(
    help="Preference training on Ray: pairs in, an aligned model out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (
    runs.train,
    runs.tune,
    runs.prepare,
    runs.score,
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
app.add_typer(clusters.jobs, name="jobs")
app.add_typer(manifests.manifest, name="manifest")
app.add_typer(recipes.recipes, name="recipes")


def main() -> None:
    """Entry point of `prefray` and of `python -m pipeline`."""
    gc.set_threshold(OBJECTS_PER_COLLECTION)
    app(prog_name="prefray")
