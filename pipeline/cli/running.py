"""How a command runs: its options, its display, and its exit status."""

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

from pipeline.config.secrets import redact_text
from pipeline.errors import JobEnded, RunFailed, RunStopped

if TYPE_CHECKING:
    from pipeline.config import RunConfig

__all__ = ["Debug", "Overrides", "Quiet", "Recipe", "execute", "hide_what_nobody_can_act_on", "load"]

Recipe = Annotated[str, typer.Argument(help="A recipe: YAML with Axolotl's keys, or the name of a packaged one.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key: rl_beta=0.2, datasets.0.split=test.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Plain lines instead of a live display.")]
Debug = Annotated[bool, typer.Option("--debug", help="Tracebacks, and the output of workers and libraries.")]


def load(recipe: str, overrides: list[str] | None) -> RunConfig:
    """The recipe of a command; one that was submitted to a cluster may not ask for others' code by itself.

    Raises:
        UserError: for what is wrong with it.
    """
    from pipeline import load_config
    from pipeline.paths import is_in_job_package
    from pipeline.security import refuse_remote_code

    cfg = load_config(recipe, overrides or [])
    if is_in_job_package():
        refuse_remote_code(recipe, cfg, overrides or [])
    return cfg


def execute(command: Callable[[Any], None], quiet: bool, debug: bool) -> None:
    """Run a command: a wrong input ends in its message and exit status 2, Ctrl-C in 130, SIGTERM in 143, a failed run in 1."""
    from pipeline.display import open_display
    from pipeline.waiting import WatchedDisplay

    if not debug:
        hide_what_nobody_can_act_on()
    display = WatchedDisplay(open_display(quiet))
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
    except JobEnded as error:
        status = _fail(str(error), error.status, debug)
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
    print(f"prefray: {redact_text(message)}", file=sys.stderr)
    return status


def hide_what_nobody_can_act_on() -> None:
    """Keep the libraries' own warnings and progress bars off the terminal."""
    from pipeline.session import QUIET

    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore")
    for name in ("ray", "transformers", "datasets", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
