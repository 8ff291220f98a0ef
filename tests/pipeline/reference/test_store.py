"""Scores that aren't what was written, or not what is asked for, are refused with what differs, and mended on request."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import score
from pipeline.config import parse_config
from pipeline.errors import UserError
from pipeline.reference.token_budget import check_embeddings, check_positions
from tests.pipeline.data.conftest import prepare_here, write_jsonl
from tests.tiny import tiny_gpt2, tiny_model, tiny_tokenizer

PART = "train/part-00001.parquet"


def truncate(folder: Path) -> None:
    data = (folder / PART).read_bytes()
    (folder / PART).write_bytes(data[: len(data) // 2])


def flip(folder: Path) -> None:
    data = bytearray((folder / PART).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / PART).write_bytes(data)


def remove(folder: Path) -> None:
    (folder / PART).unlink()


def cut_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text((folder / "manifest.json").read_text()[:-20])


def empty_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{}")


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def drop_part(folder: Path) -> None:
    edit_manifest(folder, lambda manifest: manifest["files"].pop())


def other_dtype(folder: Path) -> None:
    edit_manifest(folder, lambda manifest: manifest["inputs"]["precision"].update(weights="bfloat16"))


@pytest.mark.main_job
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"part-00001.parquet: has \d+ bytes, \d+ were written"),
        (flip, r"part-00001.parquet: was changed: its sha256 is \w+..., of what was written \w+..."),
        (remove, "part-00001.parquet: is missing"),
        (cut_manifest, "manifest.json can't be read as a manifest of scores .JSONDecodeError"),
        (empty_manifest, "manifest.json can't be read as a manifest of scores .KeyError"),
        (drop_part, r"manifest.json: lists \d parts, the prepared data have \d"),
        (other_dtype, "precision.weights: the recipe gives 'float32', the scores were computed with 'bfloat16'"),
    ],
)
def test_damage_is_refused_and_named(copied: Any, prepared: Any, damage: Callable[[Path], None], message: str) -> None:
    cfg, folder = copied
    damage(folder)
    with pytest.raises(UserError, match=f"(?s){folder}.*score RECIPE --recompute.*{message}|{message}.*RECIPE --recompute"):
        score(cfg, prepared)


@pytest.mark.main_job
def test_scores_of_another_model_and_of_other_data(copied: Any, recipe: Any, prepared: Any, tmp_path: Path) -> None:
    """A folder that was put where other scores belong."""
    from pipeline.reference.plan import make_plan
    from pipeline.reference.precision import resolve_precision
    from tests.tiny import save_tiny

    cfg, folder = copied
    other = cfg.model_copy(update={"reference_model": save_tiny(tmp_path / "other", seed=1)})
    plan = make_plan(other, prepared, resolve_precision(other, use_gpu=False))
    shutil.move(folder, folder.parent / plan.fingerprint)
    name = "reference.model.files.model.safetensors"
    with pytest.raises(UserError, match=rf"{name}: the recipe gives \w+\.\.\., the scores were computed with \w+\.\.\."):
        score(other, prepared)
    manifest = folder.parent / plan.fingerprint / "manifest.json"
    edited = json.loads(manifest.read_text())
    edited["inputs"] = json.loads(json.dumps(plan.inputs))
    edited["inputs"]["parts"][0]["ids"] = "0" * 64
    manifest.write_text(json.dumps(edited))
    with pytest.raises(UserError, match=r"parts.0.ids: the recipe gives \w+\.\.\., the scores were computed with 0000"):
        score(other, prepared)


def other_rows(folder: Path) -> None:
    shutil.copy(folder / "train" / "part-00000.parquet", folder / PART)


def edit(folder: Path) -> None:
    """Other values, in a file that is whole."""
    table = pq.read_table(folder / PART)
    chosen = pa.array([[value - 1 for value in row] for row in table["ref_chosen_logps"].to_pylist()], pa.list_(pa.float32()))
    table = table.set_column(table.column_names.index("ref_chosen_logps"), "ref_chosen_logps", chosen)
    pq.write_table(table, folder / PART)


@pytest.mark.parametrize(("damage", "staged"), [(flip, False), (other_rows, False), (edit, False), (flip, True)])
def test_what_a_killed_run_has_left_damaged_is_computed_again(
    copied: Any, prepared: Any, scores: Any, damage: Callable[[Path], None], staged: bool
) -> None:
    """Of files that are not published yet, a damaged one costs its own rows and stops nobody."""
    cfg, folder = copied
    (folder / "manifest.json").unlink()
    damage(folder)
    if staged:
        (folder / "staging").mkdir()
        (folder / PART).rename(folder / "staging" / "train-part-00001-00000000-00000010.parquet")
    again = score(cfg, prepared)
    assert again.scored_rows == pq.read_metadata(prepared.path / PART).num_rows > 0
    assert sorted(path.name for path in folder.iterdir()) == ["eval", "manifest.json", "train"]
    assert_same(again.read(), scores.read())


def test_what_a_killed_run_has_staged_and_not_joined_is_joined(copied: Any, prepared: Any, scores: Any) -> None:
    cfg, folder = copied
    (folder / "manifest.json").unlink()
    (folder / "staging").mkdir()
    (folder / PART).rename(folder / "staging" / "train-part-00001-00000000-00000010.parquet")
    again = score(cfg, prepared)
    assert (again.scored_rows, again.forwards) == (0, 0)
    assert sorted(path.name for path in folder.iterdir()) == ["eval", "manifest.json", "train"]
    assert_same(again.read(), scores.read())


def assert_same(mine: pa.Table, theirs: pa.Table) -> None:
    assert len(mine) == len(theirs) > 0
    for one, other in zip(mine.to_pylist(), theirs.to_pylist(), strict=True):
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("keys", "rows", "words"),
    [
        (
            {"rl": "grpo", "trl": {"reward_funcs": ["tests.reward_functions.short"], "max_completion_length": 64}},
            [{"prompt": "a" * 40}] * 3,
            r"row 1 of .* has 104 tokens, with the 64 of an answer that is generated, .* for 80; set sequence_len: 16",
        ),
        (
            {"dpo_generate_during_eval": True, "val_set_size": 1},
            [{"prompt": "a" * 40 + str(row), "chosen": "b", "rejected": "c"} for row in range(3)],
            r"has 105 tokens, with the 64 of an answer that is generated",
        ),
    ],
)
def test_answers_have_learned_positions_too(tmp_path: Path, keys: Any, rows: Any, words: str) -> None:
    base = tmp_path / "base"
    tiny_gpt2(tiny_tokenizer(), n_positions=80).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    data = str(write_jsonl(tmp_path / "a.jsonl", rows))
    places = {"dataset_prepared_path": str(tmp_path / "prepared"), "output_dir": str(tmp_path / "run")}
    cfg = parse_config({"base_model": str(base), "datasets": [{"path": data}], "sequence_len": 60, **places, **keys})
    with pytest.raises(UserError, match=words):
        check_positions(cfg, prepare_here(cfg))


@pytest.mark.parametrize("answer", ["b", "b <new>"])
def test_a_reference_without_embeddings_of_the_rows_tokens_is_refused(tmp_path: Path, answer: str) -> None:
    """They would be drawn at random; tokens that no row has are no matter."""
    tokenizer = tiny_tokenizer()
    tiny_model(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    data = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "chosen": answer, "rejected": "c"}] * 2)
    cfg = parse_config(
        {
            "base_model": str(tmp_path / "base"),
            "reference_model": str(tmp_path / "base"),
            "tokens": ["<new>", "<newer>"],
            "datasets": [{"path": str(data)}],
            "dataset_prepared_path": str(tmp_path / "prepared"),
            "output_dir": str(tmp_path / "run"),
        }
    )
    message = r"reference_model: .*base' has no embedding for '<new>', which 2 rows have; give a reference that was trained"
    with pytest.raises(UserError, match=message) if "new" in answer else nullcontext():
        check_embeddings(cfg, prepare_here(cfg))


def test_a_reference_is_held_to_its_own_positions_and_embeddings(tmp_path: Path) -> None:
    """Also where answers are generated, which may have any token."""
    tokenizer = tiny_tokenizer()
    small = tiny_model(tokenizer, vocab_size=len(tokenizer) + 1)
    for name, model in (("base", small), ("short", tiny_gpt2(tokenizer, n_positions=16)), ("known", tiny_model(tokenizer))):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    data = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a" * 12, "chosen": "b" * 8, "rejected": "c"}] * 2)
    places = {"dataset_prepared_path": str(tmp_path / "prepared"), "output_dir": str(tmp_path / "run")}
    keys = {"base_model": str(tmp_path / "base"), "datasets": [{"path": str(data)}], **places}
    cfg = parse_config({**keys, "reference_model": str(tmp_path / "short")})
    with pytest.raises(UserError, match=r"row 1 of .* has \d+ tokens, and '.*short' has learned positions for 16"):
        check_positions(cfg, prepare_here(cfg))
    rewards = {"trl": {"reward_funcs": ["tests.reward_functions.short"], "beta": 0.1}}
    grpo = {**keys, "rl": "grpo", **rewards, "reference_model": str(tmp_path / "known")}
    same = {**grpo, "base_model": str(tmp_path / "known")}
    check_embeddings(cfg := parse_config(same), prepare_here(cfg))
    for larger in ({**same, "tokens": ["<new>"]}, grpo):  # a policy's embeddings are padded in many models
        cfg = parse_config(larger)
        with pytest.raises(
            UserError, match=r"reference_model: .*known' has embeddings for 259 tokens, and answers may have any of 260"
        ):
            check_embeddings(cfg, prepare_here(cfg))
    cfg = parse_config({**grpo, "reference_model": str(tmp_path / "short"), "sequence_len": 32})
    with pytest.raises(
        UserError, match=r"has learned positions for 16; generate shorter answers \(trl.max_completion_length\)"
    ):
        check_positions(cfg, prepare_here(cfg))
