"""Several trials in one process, on one frozen base: each has a slot, and slots take turns, or run their rows together.

base.py           the base's weights, once; every slot's model has them and an adapter of its own
divided.py        a base of which each worker holds a part
rules.py          which configs can share a base; loads without torch
turns.py          a function that runs in turns, one of several at a time
process_state.py  what libraries keep per process, such as random states: each slot has its own
joint_steps.py    which slots run their rows in one forward, and whose turn it is between forward and backward
joint_model.py    the forward of rows of several slots: the base's products once, each adapter's for its row
limits.py         most tokens of such a forward; loads without torch
commands.py       commands to a host; loads without torch
host.py           attaches trials to slots, gives turns, and returns how each trial ended
causes.py         what an error was raised from
control.py        what several workers agree on, so that all of them give the same turns

    base = SharedBase(load_model(cfg, tokenizer))

    def run_trial(slot):                                  # in the slot's turns, on every worker
        set_seed(cfg.seed)
        builder = HFRLTrainerBuilder(slot.payload, slot.new_model(), tokenizer)
        builder.train_dataset = rows
        trainer = builder.build(steps)
        slot.join(trainer)
        trainer.train()
        return trainer.state.global_step

    # `next_commands(host)` returns [Attach(name, cfg), ...], [Stop(name)], [Close()] or []; `on_end` is given an `Ended`.
    SlotHost(base, run_trial, slots=8).run(next_commands, on_end)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from strategies.lazy import lazy_names

if TYPE_CHECKING:
    from strategies.slots.base import BaseChanged, CantShare, SharedBase
    from strategies.slots.commands import Attach, Close, Command, Stop, TakeTurns
    from strategies.slots.control import WorkersDisagree
    from strategies.slots.divided import DividedBase
    from strategies.slots.host import Ended, Slot, SlotHost
    from strategies.slots.rules import EQUAL_KEYS, find_sharing_problems, unequal_keys
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "strategies.slots.base": "BaseChanged CantShare SharedBase",
            "strategies.slots.commands": "Attach Close Command Stop TakeTurns",
            "strategies.slots.divided": "DividedBase",
            "strategies.slots.host": "Ended Slot SlotHost",
            "strategies.slots.control": "WorkersDisagree",
            "strategies.slots.rules": "EQUAL_KEYS find_sharing_problems unequal_keys",
        },
    )

__all__ = [
    "EQUAL_KEYS",
    "Attach",
    "BaseChanged",
    "CantShare",
    "Close",
    "Command",
    "DividedBase",
    "Ended",
    "SharedBase",
    "Slot",
    "SlotHost",
    "Stop",
    "TakeTurns",
    "WorkersDisagree",
    "find_sharing_problems",
    "unequal_keys",
]
