"""Reward functions by dotted path."""

from __future__ import annotations

import asyncio
import inspect
import sys
from pathlib import Path
from typing import Any

import pytest

from strategies.rewards import load_reward_functions
from tests import reward_functions


def test_functions_are_found_in_order() -> None:
    found = load_reward_functions(["tests.reward_functions.low_tokens", "tests.reward_functions.length"])
    assert [inspect.unwrap(function) for function in found] == [reward_functions.low_tokens, reward_functions.length]
    assert [function.__name__ for function in found] == ["low_tokens", "length"]
    assert found[1](prompts=["", ""], completions=["ab", [{"role": "assistant", "content": "abc"}]]) == [2.0, 3.0]


def test_the_current_directory_is_a_place_of_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards_here.py").write_text("def ones(completions, **kwargs):\n    return [1.0] * len(completions)\n")
    (tmp_path / "json.py").write_text("raise RuntimeError('installed modules come first')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(tmp_path))])
    (function,) = load_reward_functions(["my_rewards_here.ones"])
    assert function(prompts=["a"], completions=["b"], completion_ids=[[1]], answer=[3]) == [1.0]
    assert sys.path[-1] == str(tmp_path)
    load_reward_functions(["my_rewards_here.ones"])
    assert sys.path.count(str(tmp_path)) == 1


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("length", "trl.reward_funcs.0: expected module.function or a folder of a reward model, got 'length'"),
        (
            "no_such_rewards.length",
            r"trl.reward_funcs.0: can't import no_such_rewards: No module named 'no_such_rewards'; the module must be "
            r"importable on every worker \(the current directory, /.*, counts\)",
        ),
        (
            "tests.reward_functions.lenght",
            r"trl.reward_funcs.0: tests.reward_functions \(.*reward_functions.py\) has no function 'lenght'; did you mean",
        ),
        (
            "tests.reward_functions.NOT_A_FUNCTION",
            "trl.reward_funcs.0: tests.reward_functions.NOT_A_FUNCTION is no function but int",
        ),
        (
            "tests.reward_functions.only_completions",
            r"trl.reward_funcs.0: tests.reward_functions.only_completions\(completions: .*\) .* can't be called with prompts, "
            r"completions, .* by keyword; .* `def f\(completions, \*\*kwargs\)`",
        ),
        ("./nowhere/model", "trl.reward_funcs.0: no such folder: ./nowhere/model"),
        ("tests/strategies", "trl.reward_funcs.0: the folder tests/strategies holds no model"),
    ],
)
def test_what_leads_to_no_function(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_reward_functions([path])


def test_the_message_names_the_entry() -> None:
    with pytest.raises(ValueError, match="trl.reward_funcs.1: expected"):
        load_reward_functions(["tests.reward_functions.length", "nothing"])


def test_an_error_inside_a_module_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_rewards.py").write_text("import package_that_is_not_there\n")
    (tmp_path / "wrong_rewards.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="can't import broken_rewards: No module named 'package_that_is_not_there'"):
        load_reward_functions(["broken_rewards.f"])
    with pytest.raises(ValueError, match="trl.reward_funcs.0: can't import wrong_rewards: ZeroDivisionError: division by zero"):
        load_reward_functions(["wrong_rewards.f"])


def test_any_function_that_takes_what_is_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "various_rewards.py").write_text(
        "def everything(**kwargs): ...\n"
        "def one_column(completions, answer, **kwargs): ...\n"
        "async def later(completions, **kwargs): ...\n"
        "class Judge:\n    def __call__(self, completions, **kwargs): ...\n"
        "judge = Judge()\n"
        "def in_order(completions, /, **kwargs): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    names = ["everything", "one_column", "later", "judge"]
    assert len(load_reward_functions([f"various_rewards.{name}" for name in names])) == 4
    with pytest.raises(ValueError, match="in_order"):
        load_reward_functions(["various_rewards.in_order"])


def test_reward_models_stay_paths(base: str) -> None:
    assert load_reward_functions([base, "someone/reward-model"]) == [base, "someone/reward-model"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise RuntimeError('boom')", "raised RuntimeError: boom"),
        ("return 1.0", "must return a list of 2 numbers, got float"),
        ("return [1.0]", "must return one number per completion, got 1 for 2"),
        ("return ['good', 'bad']", r"must return numbers \(None where it doesn't judge\), got 'good'"),
        ("return [1.0, float('inf')]", "must return finite numbers, got inf"),
    ],
)
@pytest.mark.parametrize("kind", ["def", "async def"])
def test_what_a_function_does_wrong_is_said_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, body: str, message: str
) -> None:
    module = f"odd_{abs(hash((kind, body)))}"
    (tmp_path / f"{module}.py").write_text(f"{kind} f(completions, **kwargs):\n    {body}\n")
    monkeypatch.syspath_prepend(tmp_path)
    (function,) = load_reward_functions([f"{module}.f"])
    assert inspect.iscoroutinefunction(function) == (kind == "async def")

    def call() -> Any:
        found = function(prompts=["", ""], completions=["a", "b"], completion_ids=[[1], [2]])
        return asyncio.run(found)

    with pytest.raises(ValueError, match=rf"^trl\.reward_funcs\.0: {module}\.f {message}"):
        call()


def test_an_object_with_an_asynchronous_call_is_awaited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "    async def __call__(self, completions, **kwargs):\n        return [1.0 for _ in completions]\n"
    (tmp_path / "late_judge.py").write_text(f"class Judge:\n{body}judge = Judge()\n")
    monkeypatch.syspath_prepend(tmp_path)
    (function,) = load_reward_functions(["late_judge.judge"])
    assert asyncio.run(function(completions=["a", "b"])) == [1.0, 1.0]  # type: ignore[arg-type]


def test_a_function_may_abstain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shy.py").write_text("def f(completions, **kwargs):\n    return [None, 2]\n")
    monkeypatch.syspath_prepend(tmp_path)
    (function,) = load_reward_functions(["shy.f"])
    assert function(completions=["a", "b"]) == [None, 2]
