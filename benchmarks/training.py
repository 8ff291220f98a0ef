"""`python -m benchmarks.training --peer trl`: a training step of ours against one of TRL's.

Both train the same pairs, from the same weights, in the same global batches, in one process on the same threads: each in the
loop of its own `train()`, which takes turns with the other's step by step. A step's time is that of everything between two
turns: collating, forward, backward, optimizer, log. Processor time, of all threads, is what a busy machine changes little. The
reference's log-probabilities, where they are cached, are computed before.

`--vision` adds a generated picture to every pair, and a tower of pictures to the model. Both sides make pixels in the step;
TRL tokenises there too, as it ships.

`--memory` runs each side in a process of its own instead, and compares the most memory they held (padded batches without
checkpointing for TRL).
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Any

from rich.table import Table
from transformers import TrainerCallback

from benchmarks import common, vision
from benchmarks.sides import PEER_SETTINGS, our_trainer, scored, trl_trainer

SIDES = ("trl", "ours")


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = common.parser("training", __doc__)
    parser.add_argument("--peer", choices=["trl"], default="trl")
    parser.add_argument("--peer-settings", nargs="+", choices=list(PEER_SETTINGS), default=list(PEER_SETTINGS))
    parser.add_argument("--micro-batch", type=int, help="pairs per forward of TRL's best settings; what fits in memory")
    parser.add_argument("--tokens-per-forward", type=int, help="of ours")
    vision.add_options(parser)
    parser.add_argument("--memory", action="store_true", help="compare peak memory instead of time")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(given)
    common.quiet(options.threads)
    if options.side:
        print(json.dumps(run_side(options)))
    elif options.memory:
        compare_memory(options, given)
    else:
        compare_time(options)


def compare_time(options: argparse.Namespace) -> None:
    """Train both, in turn, once for each of the peer's settings."""
    model, processing, rows = materials(options)
    with_scores = scored(copy.deepcopy(model), processing, rows, options)
    for settings in options.peer_settings:
        with tempfile.TemporaryDirectory() as folder:
            turns = Turns(len(SIDES))
            watches = [Watch(turns, index) for index in range(len(SIDES))]
            theirs = trl_trainer(copy.deepcopy(model), processing, rows, options, folder, settings, [watches[0]])
            ours = our_trainer(
                copy.deepcopy(model),
                processing,
                with_scores,
                options,
                folder,
                [watches[1]],
                tokens_per_forward=options.tokens_per_forward,
            )
            for watch, trainer in zip(watches, (theirs, ours), strict=True):
                watch.follow(trainer)
            turns.run([theirs.train, ours.train])
        table = table_of(settings, theirs, ours, watches, options)
        if options.vision:
            table.caption = f"{table.caption}\n{vision.described(model, processing)}"
        common.console().print(table)
        del theirs, ours
        gc.collect()


def materials(options: argparse.Namespace) -> tuple[Any, Any, list[common.Row]]:
    """The model, its tokenizer or processor, and as many rows as are trained on."""
    source = vision if options.vision else common
    model, processing = source.load(options)
    return model, processing, source.load_rows(options, processing, options.steps * options.batch)


class Turns:
    """Lets threads run one at a time."""

    def __init__(self, number: int) -> None:
        self._order = list(range(number))
        self._now = 0
        self._changed = threading.Condition()
        self._errors: list[BaseException] = []

    def run(self, works: list[Callable[[], Any]]) -> None:
        """Run the first work here and now, each other in a thread of its own; raises what any of them raised."""
        threads = [threading.Thread(target=self._work, args=(index, work)) for index, work in enumerate(works) if index]
        for thread in threads:
            thread.start()
        self._work(0, works[0])
        for thread in threads:
            thread.join()
        if self._errors:
            raise self._errors[0]

    def yield_to_the_next(self, index: int) -> None:
        """Let the next one run; returns when it is `index`'s turn again."""
        with self._changed:
            self._advance(index)
            self._changed.wait_for(lambda: self._now == index)

    def _work(self, index: int, work: Callable[[], Any]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._now == index)
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised in the main thread
            self._errors.append(error)
        with self._changed:
            self._advance(index)
            self._order.remove(index)

    def _advance(self, index: int) -> None:
        place = self._order.index(index)
        self._now = self._order[(place + 1) % len(self._order)]
        self._changed.notify_all()


class Watch(TrainerCallback):
    """Takes turns after every step, and notes its seconds and the tokens that its models were fed."""

    def __init__(self, turns: Turns, index: int) -> None:
        self.turns, self.index = turns, index
        self.times: list[common.Times] = []
        self.policy_tokens: list[int] = []
        self.reference_tokens: list[int] = []
        self._fed = {"policy": 0, "reference": 0}

    def follow(self, trainer: Any) -> None:
        """Count what the models of `trainer` are fed from now on."""
        for name, model in (("policy", trainer.model), ("reference", getattr(trainer, "ref_model", None))):
            if model is not None:
                model.register_forward_pre_hook(self._counter(name), with_kwargs=True)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """All is set up; the first step comes with the next turn."""
        self._take_turns()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note the step, and let the other side run."""
        self.times.append(common.Times.now().since(self._began))
        self.policy_tokens.append(self._fed["policy"])
        self.reference_tokens.append(self._fed["reference"])
        self._fed.update(policy=0, reference=0)
        self.after_step()
        self._take_turns()

    def after_step(self) -> None:
        """What else is to be done in this turn, off the clock."""

    def _take_turns(self) -> None:
        self.turns.yield_to_the_next(self.index)
        self._began = common.Times.now()

    def _counter(self, name: str) -> Callable[..., None]:
        def count(module: Any, args: Any, kwargs: Any) -> None:
            self._fed[name] += kwargs["input_ids"].numel()

        return count


def table_of(settings: str, theirs: Any, ours: Any, watches: list[Watch], options: argparse.Namespace) -> Table:
    """One row per step, and the ratios."""
    trl, own = watches
    micro = theirs.args.per_device_train_batch_size
    precision = "bf16 autocast" if options.bf16 else "fp32"
    table = Table(title=f"TRL ({settings}, {micro} pairs a forward) and ours, {options.batch} pairs a step, {precision}")
    names = "step|s: TRL|ours|ratio|CPU s: TRL|ours|ratio|fed: TRL|its reference|ours|loss: TRL|ours|grad norm: TRL|ours"
    for name in names.split("|"):
        table.add_column(name, justify="right")
    losses, norms = [[logged(side, name) for side in (theirs, ours)] for name in ("loss", "grad_norm")]
    ratios = [their.wall / our.wall for their, our in zip(trl.times, own.times, strict=True)]
    cpu_ratios = [their.cpu / our.cpu for their, our in zip(trl.times, own.times, strict=True)]
    for step, ratio in enumerate(ratios):
        table.add_row(
            str(step + 1),
            *(f"{watch.times[step].wall:.2f}" for watch in watches),
            f"{ratio:.2f}x",
            *(f"{watch.times[step].cpu:.2f}" for watch in watches),
            f"{cpu_ratios[step]:.2f}x",
            *(f"{watch[step]:,}" for watch in (trl.policy_tokens, trl.reference_tokens, own.policy_tokens)),
            *(f"{side[step]:.6f}" for side in losses),
            *(f"{side[step]:.4f}" for side in norms),
        )
    tokens = [their / our for their, our in zip(trl.policy_tokens, own.policy_tokens, strict=True)]
    # The first step starts what the libraries start lazily, for both; it counts only where there is no other.
    counted = slice(min(1, options.steps - 1), None)
    speeds = [options.batch / statistics.median(times.wall for times in watch.times[counted]) for watch in watches]
    apart = max(abs(one - other) for one, other in zip(*losses, strict=True))
    table.caption = (
        f"time {common.ratio_text(ratios[counted])}, processor time {common.ratio_text(cpu_ratios[counted])}, "
        f"tokens of the policy {common.ratio_text(tokens)}\n"
        f"pairs/s TRL {speeds[0]:.3f}, ours {speeds[1]:.3f}; losses at most {apart:.1e} apart\n"
        f"{common.machine(options.threads)}"
    )
    return table


def logged(trainer: Any, name: str) -> list[float]:
    """A metric of every step."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def run_side(options: argparse.Namespace) -> dict[str, float]:
    """Train one side in this process; returns its peak memory in bytes, before the first step and in all."""
    model, processing, rows = materials(options)
    with tempfile.TemporaryDirectory() as folder:
        if options.side == "trl":
            trainer = trl_trainer(model, processing, rows, options, folder, options.peer_settings[0])
        else:
            keys = {"tokens_per_forward": options.tokens_per_forward}
            # A copy for pictures: scoring them changes a model's head.
            reference = copy.deepcopy(model) if options.vision else model
            rows = scored(reference, processing, rows, options)
            del reference
            trainer = our_trainer(model, processing, rows, options, folder, **keys)
        before = peak_bytes()
        trainer.train()
    return {"before": before, "peak": peak_bytes(), "micro": trainer.args.per_device_train_batch_size}


def peak_bytes() -> int:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def compare_memory(options: argparse.Namespace, given: list[str]) -> None:
    """Run each side in a process of its own."""
    table = Table("side", "pairs a forward", "peak before training", "peak", title=f"memory, {options.batch} pairs a step")
    found = {}
    for side in SIDES:
        command = [sys.executable, "-m", "benchmarks.training", *given, "--side", side, "--peer-settings", "best"]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found[side] = json.loads(output.splitlines()[-1])
        sizes = (f"{found[side][name] / 2**30:.2f} GiB" for name in ("before", "peak"))
        table.add_row(side, str(found[side]["micro"]) if side == "trl" else "packed", *sizes)
    table.caption = f"ours {found['ours']['peak'] / found['trl']['peak']:.2f}x TRL's\n{common.machine(options.threads)}"
    common.console().print(table)


if __name__ == "__main__":
    main()
