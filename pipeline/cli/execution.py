"""Execution of a command: its common options, its display, and its exit status."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.errors import JobEnded, RunFailed, RunStopped
from pipeline.secrets import redact_text

if TYPE_CHECKING:
    from rich.console import RenderableType

    from pipeline.config import RunConfig

__all__ = ["Debug", "Overrides", "Quiet", "Recipe", "execute", "load", "print_result", "quiet_libraries"]

Recipe = Annotated[str, typer.Argument(help="A recipe: YAML with Axolotl's keys, or the name of a packaged one.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key: rl_beta=0.2, datasets.0.split=test.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Plain lines instead of a live display.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks, and the output of workers and libraries.")]


def load(recipe: str, overrides: list[str] | None) -> RunConfig:
    """Load the recipe of a command; within a submitted job, refuse one that would run third-party code without consent.

    Raises:
        UserError: for an invalid recipe.
    """
    from pipeline import load_config
    from pipeline.config.paths import is_in_job_package
    from pipeline.config.trust import refuse_remote_code

    cfg = load_config(recipe, overrides or [])
    if is_in_job_package():
        refuse_remote_code(recipe, cfg, overrides or [])
    return cfg


def execute(command: Callable[[Any], None], quiet: bool, debug: bool) -> None:
    """Run a command and exit: status 2 with a message for invalid input, 130 on Ctrl-C, 143 on SIGTERM, 1 for a failed run."""
    # Imports within functions: `prefray --help` needs none of these.
    from pipeline.ui.display import open_display
    from pipeline.ui.waiting import WatchedDisplay

    if not debug:
        quiet_libraries()
    display = WatchedDisplay(open_display(quiet))
    status = 0
    try:
        command(display)
    except KeyboardInterrupt:
        status = _fail("interrupted", 130, debug)
    # Not only UserError: `strategies` and `cluster`, which don't import `pipeline`, raise ValueError for users.
    except ValueError as error:
        status = _fail(str(error), 2, debug)
    # 128 + 15, as a shell reports a process that ended by SIGTERM.
    except RunStopped as error:
        status = _fail(str(error), 143, debug)
    except SystemExit as error:  # Ray's handler of SIGTERM; training has its own
        # Any other exit is deliberate.
        if error.code != signal.SIGTERM:
            raise
        status = _fail("stopped by SIGTERM", 143, debug)
    except JobEnded as error:
        status = _fail(str(error), error.status, debug)
    except RunFailed as error:
        status = _fail(str(error), 1, debug)
    except Exception as error:  # noqa: BLE001 - the last line of defence: a message, and how to get the traceback
        what = (str(error).strip().splitlines() or [""])[-1]  # Ray's errors end with the original message
        status = _fail(f"internal error: {type(error).__name__}: {what} (run again with --debug for the traceback)", 1, debug)
    finally:
        display.close()
    raise typer.Exit(status)


def print_result(result: RenderableType, least: int = 0) -> None:
    """Print a result on standard output, in `least` columns or more where that isn't a terminal."""
    from pipeline.ui.console import open_console

    open_console(least).print(result)


def _fail(message: str, status: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"prefray: {redact_text(message)}", file=sys.stderr)
    return status


def quiet_libraries() -> None:
    """Silence the libraries' warnings and progress bars."""
    from pipeline.ray.session import QUIET

    for name, value in QUIET.items():
        # setdefault: what the user has set wins.
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore")
    for name in ("ray", "transformers", "datasets", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
