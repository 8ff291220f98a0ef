"""Commands about the packaged recipes."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from pipeline.cli.running import Debug, execute

__all__ = ["convert", "recipes"]

recipes = typer.Typer()


@recipes.callback(invoke_without_command=True)
def list_recipes(context: typer.Context) -> None:
    """The packaged recipes: `prefray train NAME` runs one, `prefray recipes show NAME` prints it."""

    def command(display: Any) -> None:
        from pipeline.config.packaged import packaged_recipe, recipe_names
        from pipeline.tables import print_recipes

        print_recipes([packaged_recipe(name) for name in recipe_names()])

    if context.invoked_subcommand is None:
        execute(command, quiet=True, debug=False)


@recipes.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As `prefray recipes` lists it.")],
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
    rl: Annotated[str | None, typer.Option("--rl", help="The method, where the file doesn't say it.")] = None,
    debug: Debug = False,
) -> None:
    """Print a recipe of another tool in our keys, each change with its reason: `prefray convert dpo.yaml > recipe.yaml`."""

    def command(display: Any) -> None:
        from pipeline.conversion import convert as run

        made = run(recipe, rl)
        print(made.text, end="")
        if made.problems:
            print(f"prefray: {len(made.problems)} to be settled, as the comments at its head say", file=sys.stderr)

    execute(command, quiet=True, debug=debug)
