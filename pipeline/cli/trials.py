"""The command `trials`: shows the trials of a sweep, ends one, or clones one with changed values."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pipeline.cli.execution import Debug, Overrides, execute, print_result

__all__ = ["trials"]

trials = typer.Typer()
Trial = Annotated[int, typer.Argument(metavar="TRIAL", help="Number of a trial.")]


@trials.callback(invoke_without_command=True)
def show(
    context: typer.Context,
    run: Annotated[str, typer.Argument(metavar="RUN", help="output_dir of a sweep, a path or a URI.")],
) -> None:
    """Show the trials of a sweep, running or not; `stop` and `clone` change a running one."""
    context.obj = run

    def command(display: Any) -> None:
        from pipeline import open_sweep

        print_result(open_sweep(run), least=140)

    # typer runs the callback before the subcommands as well.
    if context.invoked_subcommand is None:
        execute(command, quiet=True, debug=False)


@trials.command()
def stop(context: typer.Context, trial: Trial, debug: Debug = False) -> None:
    """End a trial, whose place the next one gets: `prefray trials my-sweep stop 3`."""

    def command(display: Any) -> None:
        from pipeline import open_sweep

        print(open_sweep(context.obj).stop(trial))

    execute(command, quiet=True, debug=debug)


@trials.command()
def clone(
    context: typer.Context,
    trial: Trial,
    overrides: Overrides = None,
    warm_start: Annotated[
        bool, typer.Option("--warm-start", help="Resume from the trial's last checkpoint, instead of the beginning.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Add a trial with another one's values, some changed: `prefray trials my-sweep clone 3 --set learning_rate=2e-6`."""

    def command(display: Any) -> None:
        from pipeline import open_sweep
        from pipeline.config.loading import parse_overrides

        print(open_sweep(context.obj).clone(trial, parse_overrides(overrides or []), warm_start))

    execute(command, quiet=True, debug=debug)
