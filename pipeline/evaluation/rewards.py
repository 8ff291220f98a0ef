"""Rewards of answers by reward functions."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UserError
from strategies.rewards import load_reward_functions

if TYPE_CHECKING:
    import pandas

    from pipeline.evaluation.generate_on_ray import Prompt

__all__ = ["Judge", "add_rewards", "load_judges"]


class Judge:
    """A named reward function."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = name
        self._function = function

    def rewards(
        self, prompts: Sequence[Any], completions: Sequence[Any], ids: Sequence[list[int]], columns: Mapping[str, list[Any]]
    ) -> NDArray[np.float64]:
        """Return one reward per completion, NaN where the function returns None.

        Args:
            prompts: text, or messages.
            completions: text, or a list of one message where prompts are messages.
            ids: token ids of the completions.
            columns: other columns of the rows.

        Raises:
            UserError: when the function fails, or returns anything but numbers.
        """
        # By keyword, as `GRPOTrainer` calls it; TRL's names last, so that no column replaces them.
        arguments = {**columns, "prompts": list(prompts), "completions": list(completions), "completion_ids": list(ids)}
        try:
            rewards = self._function(**arguments, trainer_state=None, log_extra=_ignore, log_metric=_ignore)
            # TRL takes coroutine functions as well.
            if inspect.isawaitable(rewards):
                # `asyncio.run` takes only a coroutine, and an awaitable may be a future.
                rewards = asyncio.run(_result(rewards))
        except ValueError as error:
            raise UserError(str(error)) from error
        return np.array([np.nan if reward is None else float(reward) for reward in rewards], dtype=np.float64)


def load_judges(paths: Sequence[str], key: str = "--reward") -> list[Judge]:
    """Load reward functions by dotted path, as in GRPO's `trl.reward_funcs`.

    Raises:
        UserError: for a path without a function, and for a reward model.
    """
    try:
        functions = load_reward_functions(paths, key)
    except ValueError as error:
        raise UserError(str(error)) from error
    judges, short_names = [], [path.rpartition(".")[2] for path in paths]
    for path, function in zip(paths, functions, strict=True):
        if isinstance(function, str):
            raise UserError(f"{key}: {path!r} is a reward model; evaluation takes functions, as module.function")
        name = path.rpartition(".")[2]
        # Two functions of one name in different modules would write the same columns.
        judges.append(Judge(name if short_names.count(name) == 1 else path, function))
    return judges


def add_rewards(table: pandas.DataFrame, prompts: Sequence[Prompt], judges: Sequence[Judge]) -> pandas.DataFrame:
    """Add `reward/NAME`, `reference_reward/NAME` and `win/NAME` of each judge to the answers."""
    names = {name for prompt in prompts for name in prompt.columns or {}}
    columns = {name: [(prompt.columns or {}).get(name) for prompt in prompts] for name in sorted(names)}
    contents = [prompt.content for prompt in prompts]
    for judge in judges:
        policy_rewards = judge.rewards(contents, _completions(contents, table["policy"]), table["policy_ids"].tolist(), columns)
        table[f"reward/{judge.name}"] = policy_rewards
        if "reference" in table:
            completions = _completions(contents, table["reference"])
            reference_rewards = judge.rewards(contents, completions, table["reference_ids"].tolist(), columns)
            table[f"reference_reward/{judge.name}"] = reference_rewards
            # NaN if either is missing: such a prompt is no comparison, and no tie.
            is_missing = np.isnan(policy_rewards + reference_rewards)
            wins = 0.5 + 0.5 * np.sign(policy_rewards - reference_rewards)
            table[f"win/{judge.name}"] = np.where(is_missing, np.nan, wins)
    return table


def _completions(prompts: Sequence[Any], answers: Iterable[str]) -> list[Any]:
    """Return completions in the format of their prompts, as the trainer passes them: messages, or text."""
    return [
        [{"role": "assistant", "content": answer}] if isinstance(prompt, list) else answer
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


async def _result(rewards: Any) -> Any:
    return await rewards


def _ignore(*_: Any, **__: Any) -> None:
    """Ignore what a function logs: it is meant for training."""
