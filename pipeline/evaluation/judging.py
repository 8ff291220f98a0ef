"""What reward functions say of answers."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UserError

if TYPE_CHECKING:
    import pandas

    from pipeline.evaluation.answering import Prompt

__all__ = ["Judge", "judged", "load_judges"]


class Judge:
    """A reward function under its own name."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = name
        self._function = function

    def rewards(
        self, prompts: Sequence[Any], completions: Sequence[Any], ids: Sequence[list[int]], columns: Mapping[str, list[Any]]
    ) -> NDArray[np.float64]:
        """One number per completion, NaN where the function doesn't judge.

        Args:
            prompts: text, or messages.
            completions: text, or a list of one message where prompts are messages.
            ids: tokens of the completions.
            columns: other columns of the rows.

        Raises:
            UserError: for what the function raises, or returns in place of numbers.
        """
        given = {**columns, "prompts": list(prompts), "completions": list(completions), "completion_ids": list(ids)}
        try:
            found = self._function(**given, trainer_state=None, log_extra=_ignore, log_metric=_ignore)
            if inspect.isawaitable(found):
                found = asyncio.run(_result(found))
        except ValueError as error:
            raise UserError(str(error)) from error
        return np.array([np.nan if reward is None else float(reward) for reward in found], dtype=np.float64)


def load_judges(paths: Sequence[str], key: str = "--reward") -> list[Judge]:
    """The reward functions of dotted paths, as GRPO's `trl.reward_funcs` names them.

    Raises:
        UserError: for a path that leads to no function, and for a reward model.
    """
    from strategies.rewards import load_reward_functions

    try:
        functions = load_reward_functions(paths, key)
    except ValueError as error:
        raise UserError(str(error)) from error
    judges, short = [], [path.rpartition(".")[2] for path in paths]
    for path, function in zip(paths, functions, strict=True):
        if isinstance(function, str):
            raise UserError(f"{key}: {path!r} is a reward model; evaluation takes functions, as module.function")
        name = path.rpartition(".")[2]
        judges.append(Judge(name if short.count(name) == 1 else path, function))
    return judges


def judged(table: pandas.DataFrame, prompts: Sequence[Prompt], judges: Sequence[Judge]) -> pandas.DataFrame:
    """The answers with `reward/NAME`, `reference_reward/NAME` and `win/NAME` of each judge."""
    names = {name for prompt in prompts for name in prompt.columns or {}}
    columns = {name: [(prompt.columns or {}).get(name) for prompt in prompts] for name in sorted(names)}
    given = [prompt.given for prompt in prompts]
    for judge in judges:
        own = judge.rewards(given, _completions(given, table["policy"]), table["policy_ids"].tolist(), columns)
        table[f"reward/{judge.name}"] = own
        if "reference" in table:
            others = _completions(given, table["reference"])
            other = judge.rewards(given, others, table["reference_ids"].tolist(), columns)
            table[f"reference_reward/{judge.name}"] = other
            table[f"win/{judge.name}"] = np.where(np.isnan(own + other), np.nan, 0.5 + 0.5 * np.sign(own - other))
    return table


def _completions(prompts: Sequence[Any], answers: Iterable[str]) -> list[Any]:
    """As the trainer hands them to reward functions: messages after messages, text after text."""
    return [
        [{"role": "assistant", "content": answer}] if isinstance(prompt, list) else answer
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


async def _result(found: Any) -> Any:
    return await found


def _ignore(*_: Any, **__: Any) -> None:
    """What a function logs while it judges is of a training's interest."""
