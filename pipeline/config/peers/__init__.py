"""Recipes of TRL, the alignment-handbook and LLaMA-Factory in our keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config.axolotl import is_off_number
from pipeline.config.changes import Change
from pipeline.config.peers.llama_factory import LLAMA_FACTORY
from pipeline.config.peers.shared import DROPPED, OFF, Found, Problem, Step, Tool, Values
from pipeline.config.peers.trl import TRL
from pipeline.errors import UserError
from strategies.registry import STRATEGIES
from strategies.trl_keys import TRLKeys

__all__ = ["DROPPED", "TOOLS", "Translation", "equivalent", "tool_of", "translate"]

TOOLS = {"TRL": TRL, "LLaMA-Factory": LLAMA_FACTORY}
FIRST = ("base_model", "rl", "datasets", "test_datasets")
"""Keys that a recipe begins with."""
INSTEAD = {"warmup_steps": "warmup_ratio", "num_epochs": "max_steps"}
"""A key -> another that says the same thing."""


@dataclass(frozen=True)
class Translation:
    """A recipe in our keys, what was changed, and (key, message) of what a person has to settle."""

    values: Values
    changes: list[Change]
    problems: list[Problem]

    def add(self, found: Change | Problem) -> None:
        """Take over what a step has found."""
        if not isinstance(found, Change):
            self.problems.append(found)
            return
        for name, value in found.becomes.items():
            if self.values.setdefault(name, value) != value:
                self.problems.append((found.key, f"says {name}: {value}, and another key {self.values[name]}; keep one"))
        self.changes.append(found)


def tool_of(values: Mapping[str, Any]) -> str:
    """Whose recipe it is, by the keys that only one has: Axolotl, TRL or LLaMA-Factory."""
    if values.keys() & {"finetuning_type", "stage", "cutoff_len", "pref_beta"}:
        return "LLaMA-Factory"
    return "TRL" if values.keys() & {"model_name_or_path", "dataset_mixer", "dataset_mixture"} else "Axolotl"


def equivalent(name: str) -> tuple[str, str] | None:
    """Tool and our key of an argument of TRL's or LLaMA-Factory's; None for other names."""
    renamed = [(tool, peer.names) for tool, peer in TOOLS.items()]
    advised = [(tool, peer.advice) for tool, peer in TOOLS.items()]
    return next(((tool, table[name]) for tool, table in (*renamed, *advised) if name in table), None)


def translate(values: Mapping[str, Any], tool: str, rl: str | None = None) -> Translation:
    """A recipe of TRL's or LLaMA-Factory's in our keys.

    Args:
        values: the recipe.
        tool: as `tool_of` says.
        rl: the method, where the recipe doesn't say it.

    Raises:
        UserError: for a recipe of something else than preferences, and for a value that can't be what its key takes.
    """
    if rl is not None and rl not in STRATEGIES:
        raise UserError(f"--rl: must be one of {', '.join(STRATEGIES)}, got {rl!r}")
    left = {name: value for name, value in values.items() if value is not None and not is_off_number(name, value)}
    made = Translation({}, [], [])
    if "max_length" in values and values["max_length"] is None:
        made.problems.append(("sequence_len", "the recipe sets no limit (max_length: null); give the most tokens of a row"))
    peer = TOOLS[tool]
    for found in (found for step in (*peer.steps, peer.method(rl), _renamed(peer)) for found in step(left)):
        made.add(found)
    for name in [name for name in left if name in made.values and left[name] != made.values[name]]:
        made.problems.append((name, f"{left[name]} and {made.values[name]} stand in the recipe; keep one"))
    whole = {**left, **made.values}
    _move_to_trl(whole)
    for name, value in _defaults(peer, whole).items():
        if name not in whole and INSTEAD.get(name) not in whole:
            whole[name] = value
            made.changes.append(Change(name, "not set", {name: value}, f"{tool}'s default"))
    ordered = {**{name: whole[name] for name in FIRST if name in whole}, **whole}
    return Translation(ordered, made.changes, made.problems)


def _defaults(tool: Tool, values: Values) -> Values:
    """What the tool does where this recipe doesn't say."""
    adapter = tool.adapter_defaults if "adapter" in values else {}
    return {**tool.defaults, **adapter, **tool.method_defaults.get(str(values.get("rl")), {})}


def _move_to_trl(values: Values) -> None:
    """The keys of grpo have a section."""
    names = [name for name in values if name in TRLKeys.model_fields and name != "beta"] if values.get("rl") == "grpo" else []
    if names:
        values["trl"] = {name: values.pop(name) for name in names}


def _renamed(tool: Tool) -> Step:
    def renamed(values: Values) -> Found:
        for name in [name for name in values if name in tool.names]:
            yield Change(name, value := values.pop(name), {tool.names[name]: value}, "its name here")
        for name in [name for name in values if name in DROPPED]:
            yield Change(name, values.pop(name), {}, DROPPED[name])
        for name in [name for name in OFF if name in values and not values[name]]:
            yield Change(name, values.pop(name), {}, "it is off")

    return renamed
