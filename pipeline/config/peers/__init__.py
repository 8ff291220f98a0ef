"""Translation of recipes of TRL, the alignment-handbook and LLaMA-Factory to our keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config.axolotl import is_off_number
from pipeline.config.changes import Change
from pipeline.config.peers.llama_factory import LLAMA_FACTORY
from pipeline.config.peers.shared import DROPPED, OFF, Problem, Results, Step, Tool, Values
from pipeline.config.peers.trl import TRL
from pipeline.errors import UserError
from strategies.methods.registry import STRATEGIES
from strategies.methods.trl_keys import TRLKeys

__all__ = ["DROPPED", "TOOLS", "Translation", "equivalent", "tool_of", "translate"]

TOOLS = {"TRL": TRL, "LLaMA-Factory": LLAMA_FACTORY}
FIRST = ("base_model", "rl", "datasets", "test_datasets")
"""Keys written first in a translated recipe."""
ALTERNATIVES = {"warmup_steps": "warmup_ratio", "num_epochs": "max_steps"}
"""A key -> an alternative key; a default applies only without both."""


@dataclass(frozen=True)
class Translation:
    """A recipe in our keys, its changes, and (key, message) of the problems left to the user."""

    values: Values
    changes: list[Change]
    problems: list[Problem]

    def add(self, item: Change | Problem) -> None:
        """Apply a change, or add a problem."""
        if not isinstance(item, Change):
            self.problems.append(item)
            return
        for name, value in item.becomes.items():
            if self.values.setdefault(name, value) != value:
                self.problems.append((item.key, f"says {name}: {value}, and another key {self.values[name]}; keep one"))
        self.changes.append(item)


def tool_of(values: Mapping[str, Any]) -> str:
    """Return the tool of a recipe, by keys that only one has: Axolotl, TRL or LLaMA-Factory."""
    if values.keys() & {"finetuning_type", "stage", "cutoff_len", "pref_beta"}:
        return "LLaMA-Factory"
    return "TRL" if values.keys() & {"model_name_or_path", "dataset_mixer", "dataset_mixture"} else "Axolotl"


def equivalent(name: str) -> tuple[str, str] | None:
    """Return the tool of an argument of TRL's or LLaMA-Factory's, and our key; None for other names."""
    renamed = [(tool, peer.names) for tool, peer in TOOLS.items()]
    advised = [(tool, peer.advice) for tool, peer in TOOLS.items()]
    return next(((tool, table[name]) for tool, table in (*renamed, *advised) if name in table), None)


def translate(values: Mapping[str, Any], tool: str, rl: str | None = None) -> Translation:
    """Translate a recipe of TRL's or LLaMA-Factory's to our keys.

    Args:
        values: the recipe.
        tool: the tool, as `tool_of` returns it.
        rl: the method, if the recipe doesn't give it.

    Raises:
        UserError: for a recipe that isn't preference training, and for a value that its key doesn't accept.
    """
    if rl is not None and rl not in STRATEGIES:
        raise UserError(f"--rl: must be one of {', '.join(STRATEGIES)}, got {rl!r}")
    # Off and empty keys say what is the default here anyway.
    left = {name: value for name, value in values.items() if value is not None and not is_off_number(name, value)}
    translation = Translation({}, [], [])
    # Only here is null a value: TRL reads it as "no limit", and `sequence_len` has to be a number.
    if "max_length" in values and values["max_length"] is None:
        translation.problems.append(
            ("sequence_len", "the recipe sets no limit (max_length: null); give the most tokens of a row")
        )
    peer = TOOLS[tool]
    # Steps remove the keys that they translate from `left`; what remains after renaming is passed on unchanged.
    for item in (item for step in (*peer.steps, peer.method(rl), _renamed(peer)) for item in step(left)):
        translation.add(item)
    # A key of ours in a foreign recipe, beside the foreign one that became it.
    for name in [name for name in left if name in translation.values and left[name] != translation.values[name]]:
        translation.problems.append((name, f"{left[name]} and {translation.values[name]} stand in the recipe; keep one"))
    # What no table knows is kept, for validation to report it by name.
    whole = {**left, **translation.values}
    _move_to_trl(whole)
    # Written out, so that a converted recipe trains as it did, whatever our defaults are.
    for name, value in _defaults(peer, whole).items():
        if name not in whole and ALTERNATIVES.get(name) not in whole:
            whole[name] = value
            translation.changes.append(Change(name, "not set", {name: value}, f"{tool}'s default"))
    ordered = {**{name: whole[name] for name in FIRST if name in whole}, **whole}
    return Translation(ordered, translation.changes, translation.problems)


def _defaults(tool: Tool, values: Values) -> Values:
    """Return the tool's defaults for a recipe, which differ from ours."""
    adapter = tool.adapter_defaults if "adapter" in values else {}
    return {**tool.defaults, **adapter, **tool.method_defaults.get(str(values.get("rl")), {})}


def _move_to_trl(values: Values) -> None:
    # Here the keys of grpo are in the section `trl`.
    names = [name for name in values if name in TRLKeys.model_fields and name != "beta"] if values.get("rl") == "grpo" else []
    if names:
        values["trl"] = {name: values.pop(name) for name in names}


def _renamed(tool: Tool) -> Step:
    def renamed(values: Values) -> Results:
        for name in [name for name in values if name in tool.names]:
            yield Change(name, value := values.pop(name), {tool.names[name]: value}, "its name here")
        for name in [name for name in values if name in DROPPED]:
            yield Change(name, values.pop(name), {}, DROPPED[name])
        for name in [name for name in OFF if name in values and not values[name]]:
            yield Change(name, values.pop(name), {}, "it is off")

    return renamed
