"""The `prefray` command."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer

from pipeline.errors import RunFailed, RunStopped

__all__ = ["app", "hide_what_nobody_can_act_on", "main"]

app = typer.Typer(
    help="Preference training on Ray: pairs in, an aligned model out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Recipe = Annotated[str, typer.Argument(help="A recipe: YAML with Axolotl's keys.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key: rl_beta=0.2, datasets.0.split=test.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Plain lines instead of a live display.")]
Debug = Annotated[bool, typer.Option("--debug", help="Tracebacks, and the output of workers and libraries.")]


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run that output_dir holds.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Prepare the data and train; the result goes to output_dir."""

    def command(display: Any) -> None:
        from pipeline import load_config
        from pipeline import train as run
        from pipeline.tables import print_result

        print_result(run(load_config(recipe, overrides or []), resume=resume, display=display, debug=debug))

    _execute(command, quiet, debug)


@app.command()
def tune(
    recipe: Annotated[str | None, typer.Argument(help="A recipe with a `tune:` section.")] = None,
    overrides: Overrides = None,
    resume: Annotated[
        str | None, typer.Option("--resume", metavar="RUN", help="Continue the sweep in this output_dir, with its own recipe.")
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Search hyperparameters: many runs on data that are prepared and scored once; results go to output_dir."""

    def command(display: Any) -> None:
        from pipeline import load_config
        from pipeline import tune as run
        from pipeline.errors import UserError
        from pipeline.tables import print_sweep
        from pipeline.tuning.folder import load_sweep, started_in

        if resume is not None and (recipe is not None or overrides):
            raise UserError("--resume: a sweep goes on with the recipe in its folder; give either --resume RUN or a recipe")
        if resume is None and recipe is None:
            raise UserError("give a recipe, or --resume and the output_dir of a sweep")
        cfg = load_sweep(resume) if resume is not None else load_config(recipe or "", overrides or [])
        if resume is not None:
            os.chdir(started_in(cfg))
        result = run(cfg, resume=resume is not None, display=display, debug=debug)
        display.close()
        print_sweep(result)

    _execute(command, quiet, debug)


@app.command()
def prepare(recipe: Recipe, overrides: Overrides = None, quiet: Quiet = False, debug: Debug = False) -> None:
    """Prepare the data; print counts, lengths, and three examples with the trained tokens marked."""

    def command(display: Any) -> None:
        from rich.console import Console

        from pipeline import load_config
        from pipeline import prepare as run
        from pipeline.data import render_preview
        from pipeline.paths import absolute_paths
        from strategies.tokenizer import load_tokenizer

        cfg = absolute_paths(load_config(recipe, overrides or []))
        display.stage("preparing data")
        prepared = run(cfg, progress=display.progress)
        tokenizer = load_tokenizer(cfg)
        display.close()
        render_preview(prepared, tokenizer, Console())

    _execute(command, quiet, debug)


@app.command()
def score(
    recipe: Recipe,
    overrides: Overrides = None,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Delete the scores that are there, damaged or not, and compute them again.")
    ] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Prepare the data and compute the reference's log-probabilities of every pair, once for all runs on these data.

    `train` does it by itself where they are not there. What a killed run has computed is kept. Only methods with a cached
    reference have anything to score (`reference: cached`, which is dpo's and ipo's default).
    """

    def command(display: Any) -> None:
        from pipeline import load_config, prepare
        from pipeline import score as run
        from pipeline.paths import absolute_paths
        from pipeline.reference import check_mode
        from pipeline.session import connect
        from pipeline.tables import print_scores

        cfg = absolute_paths(load_config(recipe, overrides or []))
        check_mode(cfg)
        display.stage("starting Ray")
        connect(cfg, debug)
        display.stage("preparing data")
        prepared = prepare(cfg, progress=display.progress)
        display.stage("scoring the reference")
        start = time.monotonic()
        scores = run(cfg, prepared, progress=display.progress, recompute=recompute)
        display.close()
        print_scores(scores, prepared, time.monotonic() - start)

    _execute(command, quiet, debug)


@app.command()
def doctor(
    recipe: Recipe,
    overrides: Overrides = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Also train two steps of the largest forwards, and show what they took.")
    ] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Check a recipe, and predict how much memory a training worker takes on this machine; loads no weights.

    Ends with status 1 when it doesn't fit.
    """

    def command(display: Any) -> None:
        from pipeline import load_config
        from pipeline.doctor import diagnose, verdict
        from pipeline.tables import print_diagnosis

        cfg = load_config(recipe, overrides or [])
        display.stage("measuring memory" if measure else "predicting memory")
        found = diagnose(cfg, with_measurement=measure)
        display.close()
        print_diagnosis(found)
        words = verdict(cfg, found)
        if not found.fits:
            raise RunFailed(words)
        print(words)

    _execute(command, quiet, debug)


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe."""
    from pipeline.config import RunConfig

    print(json.dumps(RunConfig.model_json_schema(), indent=2))


def _execute(command: Callable[[Any], None], quiet: bool, debug: bool) -> None:
    """Run a command: a wrong input ends in its message and exit status 2, Ctrl-C in 130, SIGTERM in 143, a failed run in 1."""
    from pipeline.display import open_display

    if not debug:
        hide_what_nobody_can_act_on()
    display = open_display(quiet)
    status = 0
    try:
        command(display)
    except KeyboardInterrupt:
        status = _fail("interrupted", 130, debug)
    except ValueError as error:
        status = _fail(str(error), 2, debug)
    except RunStopped as error:
        status = _fail(str(error), 143, debug)
    except SystemExit as error:  # Ray's answer to SIGTERM; training has an answer of its own
        if error.code != signal.SIGTERM:
            raise
        status = _fail("stopped by SIGTERM", 143, debug)
    except RunFailed as error:
        status = _fail(str(error), 1, debug)
    except Exception as error:  # noqa: BLE001 - the last line of defence: a message, and the way to the traceback
        what = (str(error).strip().splitlines() or [""])[-1]  # Ray's errors end with what was raised
        status = _fail(f"internal error: {type(error).__name__}: {what} (run again with --debug for the traceback)", 1, debug)
    finally:
        display.close()
    raise typer.Exit(status)


def _fail(message: str, status: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"prefray: {message}", file=sys.stderr)
    return status


def hide_what_nobody_can_act_on() -> None:
    """Keep the libraries' own warnings and progress bars off the terminal."""
    from pipeline.session import QUIET

    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore")
    for name in ("ray", "transformers", "datasets", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main() -> None:
    """Entry point of `prefray` and of `python -m pipeline`."""
    app(prog_name="prefray")
