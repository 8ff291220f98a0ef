"""`select:`: which rows it keeps, and what is wrong with it."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.config import dump_config, load_config, parse_config
from pipeline.config.selection import ROW_COLUMNS, SelectConfig
from pipeline.errors import ConfigError, UserError
from pipeline.inspection.selection import kept_rows, selected_count

COMMON = {"base_model": "m", "datasets": [{"path": "d"}]}


def kept(side: str, keep: float, values: list[float]) -> list[int]:
    return kept_rows(np.array(values), SelectConfig(**{"by": "ches", "from": side, "keep": keep})).tolist()


def test_rows_are_kept_in_the_order_of_the_store() -> None:
    values = [5.0, 1.0, 4.0, 2.0, 3.0, 0.0]
    assert kept("top", 0.5, values) == [0, 2, 4]
    assert kept("bottom", 0.5, values) == [1, 3, 5]
    assert kept("middle", 0.34, values) == [3, 4]
    assert kept("top", 1, values) == [*range(6)]
    # Of equal values the first rows count as the lowest.
    assert kept("bottom", 0.5, [0.0] * 4) == [0, 1] and kept("top", 0.5, [0.0] * 4) == [2, 3]


def test_a_saved_recipe_has_the_section_as_it_was_written(tmp_path: object) -> None:
    section = {"by": "length_ratio", "from": "middle", "keep": 0.25}
    cfg = parse_config({**COMMON, "select": section})
    file = tmp_path / "saved.yaml"  # type: ignore[operator]
    file.write_text(dump_config(cfg))
    assert load_config(file).select == cfg.select
    assert cfg.model_dump()["select"] == section and cfg.select is not None and cfg.select.side == "middle"
    assert parse_config({**COMMON, "select": {"by": "ches", "keep": 1}, "ray": {"score": {"hidden_states": True}}}).select


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"select": {"by": "margin", "keep": 0.5}}, r"select.by: margin is no column; there are: prompt_length, .*score_gap"),
        ({"select": {"by": "ches", "keep": 0.5}}, r"select.by: ches needs cached scores with ray.score.hidden_states: true"),
        (
            {"rl": "simpo", "select": {"by": "score_gap", "keep": 0.5}},
            r"score_gap needs the reference's cached scores .*; there are: prompt_length, chosen_length(?!.*score_gap)",
        ),
        ({"rl": "kto", "select": {"by": "length_ratio", "keep": 0.5}}, r"length_ratio is no column of rows of rl: kto"),
        ({"rl": "grpo", "select": {"by": "prompt_length", "keep": 0.5}}, r"select: rows of rl: grpo have a prompt alone"),
        ({"select": {"by": "length_ratio", "keep": 0}}, r"select.keep: must be greater than 0, got 0"),
        ({"select": {"by": "length_ratio", "keep": True}}, r"select.keep: must be a number, got true"),
        ({"profile": {"steps": [True, 2]}}, r"profile.steps: must be a number, got true"),
        ({"select": {"by": "length_ratio", "keep": 0.5, "from": "best"}}, r"select.from: must be 'top', 'bottom' or 'middle'"),
        ({"split_by": "row"}, r"split_by: has no effect without val_set_size"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({**COMMON, **keys})


def test_a_selection_that_leaves_nothing_says_how_much_would_leave_a_row() -> None:
    cfg = parse_config({**COMMON, "select": {"by": "length_ratio", "keep": 0.01}})
    with pytest.raises(UserError, match=r"select.keep: 0.01 of 40 training rows leaves none to train on; give 0.025 or more"):
        selected_count(cfg, 40)
    assert selected_count(cfg, 400) == 4


def test_every_column_says_what_it_is() -> None:
    assert all(column.description and column.kinds for column in ROW_COLUMNS.values())
