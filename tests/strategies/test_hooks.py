"""The methods of transformers and TRL that trainers override are those that the package's docstring lists."""

from __future__ import annotations

import inspect
import re
import sys

from strategies import trainers

HOOKS, _, USED = (trainers.__doc__ or "").partition("Private names of theirs")
TRAINERS = (trainers.AxolotlDPOTrainer, trainers.AxolotlKTOTrainer, trainers.AxolotlGRPOTrainer)


def test_the_hooks_are_listed() -> None:
    overridden = {
        name
        for trainer in TRAINERS
        for ours in trainer.__mro__
        if ours.__module__.startswith("strategies.")
        for name, value in vars(ours).items()
        if not name.startswith("__") and callable(value)
        if any(name in vars(base) for base in trainer.__mro__ if base.__module__.startswith(("trl.", "transformers.")))
    }
    listed = HOOKS.partition("in the order in which")[2]
    assert overridden == {name for name in re.findall(r"\b[a-z_]+\b", listed) if "_" in name or name in ("log", "train")} - {
        "step_guard"
    }


def private_names(modules: set[str]) -> set[str]:
    """Of methods and attributes: `self._name` and `super()._name` in the sources, also by `getattr`."""
    sources = [inspect.getsource(sys.modules[module]) for module in modules]
    return {name for source in sources for name in re.findall(r"\b(?:self|super\(\))(?:\.|, \")(_[a-z]\w*)", source)}


def test_other_private_names_are_listed() -> None:
    """Attributes too: one of ours with the name of one of theirs would be an accident."""
    classes = {base for trainer in TRAINERS for base in trainer.__mro__}
    ours = {one.__module__ for one in classes if one.__module__.startswith("strategies.")}
    theirs = {one for one in classes if one.__module__.startswith(("trl.", "transformers."))}
    used = private_names(ours) & (
        private_names({one.__module__ for one in theirs}) | {name for one in theirs for name in vars(one)}
    )
    assert used - set(re.findall(r"\b_\w+", HOOKS)) == set(re.findall(r"\b_\w+", USED))
