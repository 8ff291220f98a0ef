"""Commands that run a recipe: train, tune, and single stages."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli.execution import Debug, Overrides, Quiet, Recipe, execute, load, print_result

__all__ = ["prepare", "schema", "score", "train", "tune"]


def train(
    recipes: Annotated[
        list[str], typer.Argument(metavar="RECIPE...", help="Recipes: YAML with Axolotl's keys, or names of packaged ones.")
    ],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in output_dir.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Prepare the data and train; the result goes to output_dir.

    Several recipes are trained at once as far as the cluster has room for them; those of adapters share one copy of their base
    model. All options apply to all of them.
    """

    def command(display: Any) -> None:
        from pipeline import train as run

        if len(recipes) > 1:
            return _train_together(recipes, overrides or [], display, resume=resume, debug=debug)
        result = run(load(recipes[0], overrides), resume=resume, display=display, debug=debug)
        display.close()
        print_result(result)
        return None

    execute(command, quiet, debug)


def _train_together(recipes: list[str], overrides: list[str], display: Any, **options: Any) -> None:
    """Train several recipes, and print the result of each run that has finished."""
    from pipeline import train_together
    from pipeline.training.together.schedule import RunsFailed

    names = _names(recipes)
    try:
        finished = dict(
            zip(names, train_together(_load_all(recipes, overrides), names, display=display, **options), strict=True)
        )
    except RunsFailed as failure:
        display.close()
        _print_runs(failure.finished)
        raise
    display.close()
    _print_runs(finished)


def _load_all(recipes: list[str], overrides: list[str]) -> list[Any]:
    """Load recipes; raise one UserError for all that is wrong with them."""
    from pipeline.config.loading import parse_overrides
    from pipeline.errors import UserError
    from pipeline.training.together.rules import ONE_RUNS

    if unfit := sorted(parse_overrides(overrides).keys() & set(ONE_RUNS)):
        raise UserError(
            f"--set {unfit[0]}: would be that of all {len(recipes)} recipes, and each run needs its own; write it in them"
        )
    if twice := next((recipe for recipe in recipes if recipes.count(recipe) > 1), None):
        raise UserError(f"{twice}: stands twice, and would be two runs in one folder; give each recipe once")
    loaded, problems = [], []
    for recipe in recipes:
        try:
            loaded.append(load(recipe, overrides))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return loaded


def _names(recipes: list[str]) -> list[str]:
    """Return the files' names without their ends, or where these are equal, the recipes as they were given."""
    names = [Path(recipe).stem for recipe in recipes]
    return names if len(set(names)) == len(names) else recipes


def _print_runs(finished: dict[str, Any]) -> None:
    from rich.console import Group
    from rich.text import Text

    for name, result in finished.items():
        print_result(Group(Text(f"\n{name}", "bold"), result))


def tune(
    recipe: Annotated[str | None, typer.Argument(help="A recipe with a `tune:` section.")] = None,
    overrides: Overrides = None,
    resume: Annotated[
        str | None,
        typer.Option("--resume", metavar="RUN", help="Continue the sweep in this output_dir, with its saved recipe."),
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Search hyperparameters with many runs on data that are prepared and scored once; results go to output_dir."""

    def command(display: Any) -> None:
        from pipeline import tune as run
        from pipeline.errors import UserError
        from pipeline.tuning.folder import load_sweep, started_in

        if resume is not None and (recipe is not None or overrides):
            raise UserError("--resume: a sweep goes on with the recipe in its folder; give either --resume RUN or a recipe")
        if resume is None and recipe is None:
            raise UserError("give a recipe, or --resume and the output_dir of a sweep")
        cfg = load_sweep(resume) if resume is not None else load(recipe or "", overrides)
        if resume is not None:
            # The saved recipe's relative paths are of the folder that the sweep was started in.
            os.chdir(started_in(cfg))
        result = run(cfg, resume=resume is not None, display=display, debug=debug)
        display.close()
        print_result(result, least=140)

    execute(command, quiet, debug)


def prepare(recipe: Recipe, overrides: Overrides = None, quiet: Quiet = False, debug: Debug = False) -> None:
    """Prepare the data; print counts, lengths, and three examples with the trained tokens marked."""

    def command(display: Any) -> None:
        from pipeline import prepare as run
        from pipeline.config.paths import absolute_paths
        from pipeline.data import Preview
        from strategies.models.tokenizer import load_tokenizer

        cfg = absolute_paths(load(recipe, overrides))
        for note in cfg.notes:
            display.note(note)
        display.stage("preparing data")
        prepared = run(cfg, progress=display.progress)
        tokenizer = load_tokenizer(cfg)
        display.close()
        print_result(Preview(prepared, tokenizer))

    execute(command, quiet, debug)


def score(
    recipe: Recipe,
    overrides: Overrides = None,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Delete the cached scores, damaged or not, and compute them again.")
    ] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Prepare the data and compute the reference's log-probabilities of every pair, once for all runs on these data.

    `train` does the same where they aren't cached yet. Results of a killed process are kept. Only methods with a cached
    reference have anything to score (`reference: cached`, which is dpo's and ipo's default).
    """

    def command(display: Any) -> None:
        from pipeline import prepare
        from pipeline import score as run
        from pipeline.config.paths import absolute_paths
        from pipeline.data.store import check_root
        from pipeline.ray.session import init_ray
        from pipeline.reference import check_mode
        from pipeline.reference.score_store import describe

        cfg = absolute_paths(load(recipe, overrides))
        # Before the data are prepared, which may take long.
        check_mode(cfg)
        for note in cfg.notes:
            display.note(note)
        check_root(cfg.dataset_prepared_path)
        display.stage("starting Ray")
        # Here, for `debug`: `prepare` would start Ray without it.
        init_ray(cfg, debug)
        display.stage("preparing data")
        prepared = prepare(cfg, progress=display.progress)
        display.stage("scoring the reference")
        start = time.monotonic()
        scores = run(cfg, prepared, progress=display.progress, recompute=recompute)
        display.close()
        print_result(describe(scores, prepared, time.monotonic() - start))

    execute(command, quiet, debug)


def schema() -> None:
    """Print the JSON schema of a recipe, including the keys of installed plugins."""
    from pipeline.config import config_class

    print(json.dumps(config_class().model_json_schema(), indent=2))
