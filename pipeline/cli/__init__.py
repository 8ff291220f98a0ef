"""The `prefray` command, which is `python -m pipeline` too."""

from __future__ import annotations

import typer

from pipeline.cli import clusters, manifests, models, recipes, runs
from pipeline.cli.running import hide_what_nobody_can_act_on

__all__ = ["app", "hide_what_nobody_can_act_on", "main"]

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
    app(prog_name="prefray")
