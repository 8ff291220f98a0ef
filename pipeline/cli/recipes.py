"""Commands for recipes: list and show the packaged ones, convert other tools'."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.execution import Debug, execute, print_result

if TYPE_CHECKING:
    from pipeline.config.packaged import PackagedRecipe

__all__ = ["convert", "recipes"]

recipes = typer.Typer()


@recipes.callback(invoke_without_command=True)
def list_recipes(context: typer.Context) -> None:
    """List the packaged recipes: `prefray train NAME` runs one, `prefray recipes show NAME` prints it."""

    def command(display: Any) -> None:
        from pipeline.config.packaged import packaged_recipe, recipe_names
        from pipeline.ui.console import lines_of

        print_result(lines_of({name: _described(packaged_recipe(name)) for name in recipe_names()}))

    # typer runs the callback before `show` as well.
    if context.invoked_subcommand is None:
        execute(command, quiet=True, debug=False)


@recipes.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a packaged recipe, as listed by `prefray recipes`.")],
    debug: Debug = False,
) -> None:
    """Print a packaged recipe: `prefray recipes show dpo-lora > recipe.yaml`."""

    def command(display: Any) -> None:
        from pipeline.config.packaged import packaged_recipe, recipe_names
        from pipeline.errors import UserError

        if name not in recipe_names():
            raise UserError(f"{name}: no packaged recipe; there are: {', '.join(recipe_names())}")
        print(packaged_recipe(name).text, end="")

    execute(command, quiet=True, debug=debug)


def convert(
    recipe: Annotated[
        str, typer.Argument(metavar="FILE", help="YAML of Axolotl, TRL, the alignment-handbook or LLaMA-Factory.")
    ],
    rl: Annotated[str | None, typer.Option("--rl", help="The method, if the file doesn't name it.")] = None,
    debug: Debug = False,
) -> None:
    """Convert a recipe of another tool, noting each change with its reason: `prefray convert dpo.yaml > recipe.yaml`."""

    def command(display: Any) -> None:
        from pipeline.conversion import convert as run

        converted = run(recipe, rl)
        print(converted.text, end="")
        if converted.problems:
            # On stderr: stdout is the recipe, mostly redirected to a file.
            print(f"prefray: {len(converted.problems)} to be settled, as the comments at its head say", file=sys.stderr)

    execute(command, quiet=True, debug=debug)


def _described(recipe: PackagedRecipe) -> str:
    """Name a packaged recipe's method and model, the hardware its settings were published for, and their sources."""
    published = f"; published for {recipe.hardware}" if recipe.hardware else ""
    return "\n".join([f"{recipe.method}: {recipe.model}{published}", *recipe.sources])
