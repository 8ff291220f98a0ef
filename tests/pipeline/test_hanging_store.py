"""A store that takes connections and never answers ends every command soon, with one message."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.io import filesystems, first_answer
from pipeline.io.filesystems import INTERACTIVE_S3_ATTEMPTS, S3_SILENCE_S
from tests.tiny import pairs

runner = CliRunner()
RUN = "s3://bucket/run"
STORED = {
    "dataset_prepared_path": "s3://bucket/prepared",
    "datasets": [{"path": "s3://bucket/pairs.jsonl"}],
    "base_model": "s3://bucket/model",
}


class Hanging:
    """A real socket."""

    def __init__(self) -> None:
        self.taken: list[socket.socket] = []
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.address = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._take, daemon=True).start()

    def _take(self) -> None:
        with suppress(OSError):  # closed
            while True:
                self.taken.append(self._socket.accept()[0])

    def close(self) -> None:
        for one in (self._socket, *self.taken):
            one.close()


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hanging]:
    store = Hanging()
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")
    for name, value in {**dict.fromkeys(keys, "us-east-1"), "AWS_ENDPOINT_URL": store.address}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(filesystems, "INTERACTIVE_S3_ATTEMPTS", 1)
    monkeypatch.setattr(filesystems, "S3_SILENCE_S", 1.0)
    yield store
    store.close()


@pytest.fixture
def recipe(tmp_path: Path, tiny_base: str) -> Path:
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs(8)))
    keys = {
        "base_model": tiny_base,
        "rl": "dpo",
        "datasets": [{"path": str(tmp_path / "pairs.jsonl")}],
        "dataset_prepared_path": str(tmp_path / "prepared"),
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(keys))
    return tmp_path / "recipe.yaml"


@pytest.mark.parametrize(
    ("command", "key"),
    [
        *((("prepare",), key) for key in STORED),
        *((command, "dataset_prepared_path") for command in (("score",), ("train",), ("inspect",))),
        (("train",), "output_dir"),
    ],
)
def test_a_recipe_with_it(hanging: Hanging, recipe: Path, command: tuple[str, ...], key: str) -> None:
    keys = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump({**keys, key: STORED.get(key, RUN)}))
    result = runner.invoke(app, [*command, str(recipe)])
    assert result.exit_code == 2, result.output
    message = result.stderr.splitlines()[-1]
    assert key in message and "it doesn't answer in time" in message and "AWS_ENDPOINT_URL" in message
    assert len(hanging.taken) == 1


@pytest.mark.parametrize("command", ["evaluate RUN", "generate RUN Why?", "merge RUN", "report RUN", "tune --resume RUN"])
def test_a_run_in_it(hanging: Hanging, command: str) -> None:
    result = runner.invoke(app, command.replace("RUN", RUN).split())
    assert result.exit_code == 2, result.output
    assert "it doesn't answer in time" in result.stderr.splitlines()[-1]
    assert len(hanging.taken) == 1


def test_another_store(hanging: Hanging, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Google's client would wait for two minutes."""
    monkeypatch.setattr(first_answer, "ANSWER_S", 1.0)
    store = f"gs://anonymous@bucket/x?scheme=http&endpoint_override={hanging.address.removeprefix('http://')}"
    keys = yaml.safe_load(recipe.read_text())
    for key in ("dataset_prepared_path", "datasets"):
        there = [{"path": store}] if key == "datasets" else store
        recipe.write_text(yaml.safe_dump({**keys, key: there}))
        result = runner.invoke(app, ["prepare", str(recipe)])
        assert result.exit_code == 2, result.output
        message = result.stderr.splitlines()[-1]
        assert key in message and message.endswith("it doesn't answer in time: nothing for 1 seconds")


def test_the_limits_of_a_user_are_half_a_minute() -> None:
    """Attempts, and the longest pauses between them."""
    assert INTERACTIVE_S3_ATTEMPTS * S3_SILENCE_S + sum(2**number for number in range(INTERACTIVE_S3_ATTEMPTS - 1)) < 30
