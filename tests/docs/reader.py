"""A reader who does what a page says, block by block, in an empty folder: with tiny models and data under the names it uses."""

from __future__ import annotations

import json
import logging
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.config import parse_config, parse_yaml
from pipeline.tuning.space import check_trials, corners
from tests.docs.blocks import Block
from tests.tiny import pairs, save_tiny
from tests.tiny_vision import save_vision

__all__ = ["DEFAULT_RECIPE", "Reader"]

PREFRAY = ("prefray", ".venv/bin/prefray", "python -m pipeline", ".venv/bin/python -m pipeline")
OF_A_RUN = ("evaluate", "generate", "merge", "report")
"""Commands whose first word is what a run has left."""
SMALLER = ["--set", "tune.num_samples=1"]
"""What is added to the command of a sweep that draws its trials."""
DEFAULT_RECIPE: dict[str, Any] = {
    "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "datasets": [{"path": "pairs.jsonl"}],
    "val_set_size": 4,
    "adapter": "lora",
    "micro_batch_size": 4,
    "output_dir": "my-run",
}
"""What stands in a recipe that a page only names."""


class Reader:
    """Follows one page.

    Args:
        folder: where the page's files are made.
        run: the folder of a finished run with an adapter, for pages that take one for granted.
    """

    def __init__(self, folder: Path, run: Path) -> None:
        self.folder, self.run = folder, run
        self.names: dict[str, Any] = {}
        save_tiny(folder / DEFAULT_RECIPE["base_model"])

    def follow(self, block: Block) -> None:
        """Do what a block says."""
        {"bash": self._bash, "python": self._python, "yaml": self._yaml}[block.language](block)

    # Recipes

    def _yaml(self, block: Block) -> None:
        for text in re.split(r"^---$", block.text, flags=re.MULTILINE):
            values = parse_yaml(text, block.place)
            if block.file:
                path = self.folder / block.file["name"]
                values = {**(yaml.safe_load(path.read_text()) if block.file["goes_on"] else {}), **values}
                path.write_text(yaml.safe_dump(values, sort_keys=False))
            _validate(values, block.place)

    def _have_recipe(self, name: str) -> None:
        """What a recipe names is there: itself, its models, its data."""
        path = self.folder / name
        if not path.exists():
            path.write_text(yaml.safe_dump(DEFAULT_RECIPE))
        values = yaml.safe_load(path.read_text())
        for key in ("base_model", "reference_model"):
            model = self.folder / values.get(key, "")
            if not model.exists() and "://" not in values[key]:
                save_vision(model, "idefics3") if "SmolVLM" in model.name else save_tiny(model)
        for dataset in values.get("datasets", []) + values.get("test_datasets", []):
            file = self.folder / dataset["path"]
            if file.suffix == ".jsonl" and "://" not in dataset["path"] and not file.exists():
                self._write_rows(file)

    def _write_rows(self, file: Path) -> None:
        """Data; of a text file, prompts."""
        rows = _rows(16)
        lines = [json.dumps(row) for row in rows] if file.suffix == ".jsonl" else [row["prompt"] for row in rows[:4]]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{line}\n" for line in lines))

    def _have_run(self, name: str) -> None:
        """A finished run of that name; a trial's lies within its sweep."""
        for place in dict.fromkeys((name.split("/")[0], name)):
            if not (self.folder / place).exists():
                shutil.copytree(self.run, self.folder / place)

    def _make_room(self, name: str) -> None:
        """An earlier block's run makes room for the next one's."""
        output = self.folder / yaml.safe_load((self.folder / name).read_text()).get("output_dir", "model-out")
        if output.exists():
            shutil.rmtree(output)

    # Python

    def _python(self, block: Block) -> None:
        if block.file:
            (self.folder / block.file["name"]).write_text(block.text)
            return
        for name in re.findall(r"load_config\(\"([^\"]+)\"", block.text):
            self._have_recipe(name)
        for name in re.findall(rf"\b(?:{'|'.join(OF_A_RUN)}|write_report)\(\"([\w./-]+)\"", block.text):
            self._have_run(name)
        if re.search(r"\b(train|tune)\(", block.text):
            shutil.rmtree(self.folder / "my-run", ignore_errors=True)
        exec(compile("\n" * (block.line - 1) + block.text, str(block.page), "exec"), self.names)

    # Commands

    def _bash(self, block: Block) -> None:
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if not words:
                continue
            program = next((name for name in PREFRAY if words[: len(name.split())] == name.split()), None)
            assert program is not None, f"{block.place}: `{line}` is no command that a test can run; mark the block"
            self._prefray(words[len(program.split()) :], f"{block.place}: {line}")

    def _prefray(self, words: list[str], place: str) -> None:
        words, output = (words[: words.index(">")], words[-1]) if ">" in words else (words, None)
        self._prepare_for(words)
        words += SMALLER if self._draws_trials(words) else []
        status, printed, said = _here(words)
        assert status == 0, f"{place}\n{printed}\n{said}"
        if output is not None:
            (self.folder / output).write_text(printed)

    def _draws_trials(self, words: list[str]) -> bool:
        if words[0] != "tune" or "--resume" in words:
            return False
        return yaml.safe_load((self.folder / words[1]).read_text()).get("tune", {}).get("search") != "grid"

    def _prepare_for(self, words: list[str]) -> None:
        for word in words:
            if word.endswith(".yaml") and words[0] != "manifest":
                self._have_recipe(word)
                if words[0] in ("train", "tune") and "--resume" not in words:
                    self._make_room(word)
            elif word.endswith((".jsonl", ".txt")) and not (self.folder / word).exists():
                self._write_rows(self.folder / word)
        if words[0] in OF_A_RUN and len(words) > 1:
            self._have_run(words[1])


def _here(words: list[str]) -> tuple[int, str, str]:
    """The command in this process, which has joined Ray already."""
    logging.raiseExceptions = False  # Ray's handlers keep the stream of the first command that ran here
    result = CliRunner().invoke(app, words)
    return result.exit_code, result.stdout, result.stderr


def _validate(values: dict[str, Any], place: str) -> None:
    """A recipe, or a part of one: it is right on top of the least that a recipe has."""
    base: dict[str, Any] = {"base_model": "org/model", "datasets": [{"path": "pairs.jsonl"}], "val_set_size": 0.1}
    if "test_datasets" in values:
        del base["val_set_size"]
    cfg = parse_config({**base, **values}, origin=place)
    if cfg.tune is not None:
        assert check_trials(cfg, corners(cfg.tune))


def _rows(number: int) -> list[dict[str, Any]]:
    """Rows that every method can use, under the columns of every type of plain text."""
    return [
        {**pair, "question": pair["prompt"], "completion": pair["chosen"], "label": index % 2 == 0}
        for index, pair in enumerate(pairs(number))
    ]
