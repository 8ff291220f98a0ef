"""Every command, recipe and program that the pages show is run."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import TrainResult
from tests.docs.blocks import PAGES, ROOT, blocks_of
from tests.docs.reader import Reader

RUN = ("bash", "python", "yaml")
OTHER_NAMES = {"sh": "bash", "shell": "bash", "console": "bash", "zsh": "bash", "py": "python", "yml": "yaml"}
MOST_NOT_RUN = 15


def cost(page: Path) -> list[pytest.MarkDecorator]:
    """The README is a part of the main job."""
    return [pytest.mark.main_job] if page.name == "README.md" else []


def test_every_block_says_what_it_is() -> None:
    for page in PAGES:
        for block in blocks_of(page):
            other = OTHER_NAMES.get(block.language)
            assert other is None, f"{block.place}: write ```{other}, not ```{block.language}, so that it is run"


def test_few_blocks_are_only_shown() -> None:
    shown = [block.place for page in PAGES for block in blocks_of(page) if block.language in RUN and block.not_run]
    assert len(shown) <= MOST_NOT_RUN, shown


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT)), marks=cost(page)) for page in PAGES])
def test_what_a_page_says_works(
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    finished_adapter: TrainResult,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    reader = Reader(tmp_path, Path(str(finished_adapter.run_dir)))
    for block in blocks_of(page):
        if block.language in RUN and not block.not_run:
            reader.follow(block)
