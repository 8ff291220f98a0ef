"""The stage as a whole: in this process, and on a real Ray where errors and files travel."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.data import prepare
from pipeline.data.store import open_store
from pipeline.errors import RunFailed, UserError
from pipeline.io import lease
from pipeline.io.retry import waits
from pipeline.io.storage import Folder
from pipeline.ray.tasks import run_on_ray
from tests.leases import another, take_over
from tests.pipeline.data.conftest import SHARED_DATA, make_config, prepare_here, write_jsonl
from tests.tiny import pairs
from tests.waiting import wait_for

ROOT = Path(__file__).parents[3]


def numbers(prepared, split="train"):
    return prepared.read(split, ["row_id"])["row_id"].to_pylist()


def test_columns_order_and_manifest(tmp_path, tokenizer):
    first, second = write_jsonl(tmp_path / "a.jsonl", pairs(10)), tmp_path / "b.json"
    second.write_text(json.dumps(pairs(14)[10:]))
    cfg = make_config(tmp_path, {"path": str(first)}, {"path": str(second), "type": "chatml.prompt_pairs"}, val_set_size=3)
    seen = []
    prepared = prepare_here(cfg, tokenizer, progress=seen.append, rows_per_part=4)

    assert (prepared.train_rows, prepared.eval_rows, prepared.rejected_rows) == (11, 3, 0)
    assert sorted(numbers(prepared) + numbers(prepared, "eval")) == list(range(14))
    assert numbers(prepared) == sorted(numbers(prepared))
    table = prepared.read()
    assert {name: str(table.schema.field(name).type) for name in ("row_id", "prompt_ids", "chosen_length")} == {
        "row_id": "int64",
        "prompt_ids": "list<element: int32>",
        "chosen_length": "int32",
    }
    row = next(row for row in table.to_pylist() if row["row_id"] >= 10)
    assert (row["source"], row["row_number"]) == (str(second), row["row_id"] - 9)
    assert row["prompt"].startswith("<|im_start|>user\nWhat is")
    assert tokenizer.decode(row["prompt_ids"] + row["chosen_ids"]) == row["prompt"] + row["chosen"]

    manifest = prepared.manifest
    assert [(source["read"], source["train"] + source["eval"]) for source in manifest["sources"]] == [(10, 10), (4, 4)]
    assert sum(entry["rows"] for entry in manifest["files"]) == 14
    assert manifest["lengths"]["prompt"]["max"] == max(
        length for split in ("train", "eval") for length in prepared.read(split)["prompt_length"].to_pylist()
    )
    assert seen[-1]["rows_done"] == 14 and seen[-1]["parts_done"] == 4
    assert sorted(path.name for path in prepared.path.iterdir()) == ["eval", "manifest.json", "train"]


@pytest.mark.usefixtures("ray_session")
def test_a_recipe_and_a_model_folder(tmp_path):
    from pipeline.config import parse_config
    from tests.tiny import save_tiny, tiny_tokenizer

    rows = [{"messages": [{"from": "me", "value": row["prompt"]}], **row} for row in pairs(6)]
    dataset = {
        "path": str(write_jsonl(tmp_path / "a.jsonl", rows)),
        "type": "chat_template.default",
        "roles": {"user": ["me"]},
        "message_property_mappings": {"role": "from", "content": "value"},
    }
    keys = {"rl": "dpo", "base_model": save_tiny(tmp_path / "model"), "sequence_len": 512, "output_dir": str(tmp_path / "out")}
    cfg = parse_config({**keys, "datasets": [dataset], "dataset_prepared_path": str(tmp_path / "prepared")})
    prepared = prepare(cfg)
    expected = f"<|im_start|>user\n{rows[0]['prompt']}<|im_end|>\n<|im_start|>assistant\n"
    assert prepared.read()["prompt"][0].as_py() == expected
    assert tiny_tokenizer().decode(prepared.read()["prompt_ids"][0].as_py()) == expected


def test_a_run_says_which_rows_are_left_out(tmp_path, monkeypatch):
    from pipeline.config import parse_config
    from pipeline.training.driver import prepare_data
    from pipeline.ui.display import SilentDisplay
    from tests.tiny import save_tiny

    monkeypatch.setattr("pipeline.training.driver.prepare", prepare_here)
    row, long = pairs(1)[0], {**pairs(1)[0], "chosen": "x" * 600}
    dataset = {"path": str(write_jsonl(tmp_path / "a.jsonl", [row, row, long, {**row, "chosen": row["rejected"]}]))}
    keys = {"rl": "dpo", "base_model": save_tiny(tmp_path / "model"), "sequence_len": 256, "output_dir": str(tmp_path / "out")}
    keys |= {"dataset_exact_deduplication": True, "max_rejected_fraction": 0.5, "dataset_prepared_path": str(tmp_path / "p")}
    display, shown = SilentDisplay(), []
    monkeypatch.setattr(display, "note", shown.append)
    prepare_data(parse_config({**keys, "datasets": [dataset]}), display)
    left_out = "1 training and 0 evaluation rows (left out: 1 rejected, 1 too long, 1 duplicates)"
    assert shown[0].startswith(f"prepared {left_out}: ")


def test_a_complete_store_is_opened_without_ray(tmp_path, tokenizer, monkeypatch):
    cfg = make_config(tmp_path, {"path": str(write_jsonl(tmp_path / "a.jsonl", pairs(3)))})
    first = prepare_here(cfg, tokenizer)
    monkeypatch.setattr("pipeline.data.preparation.run_on_ray", None)
    assert prepare(cfg, tokenizer) == first


@pytest.mark.parametrize("rl", ["ipo", "simpo", "orpo"])
def test_methods_that_learn_from_pairs_share_a_store(tmp_path, tokenizer, monkeypatch, rl):
    dataset = {"path": str(write_jsonl(tmp_path / "a.jsonl", pairs(3)))}
    first = prepare_here(make_config(tmp_path, dataset), tokenizer)
    monkeypatch.setattr("pipeline.data.preparation.run_on_ray", None)
    assert prepare(make_config(tmp_path, dataset, rl=rl), tokenizer) == first
    assert first.manifest["kind"] == first.manifest["inputs"]["kind"] == "pair"


def test_pairs_for_kto_show_the_way_out(tmp_path, tokenizer):
    cfg = make_config(tmp_path, {"path": str(write_jsonl(tmp_path / "a.jsonl", pairs(3)))}, rl="kto")
    message = r"max_rejected_fraction: 3 of 3 rows are bad.*row 1: .*split_pairs: true makes two labelled rows of it"
    with pytest.raises(UserError, match=f"(?s){message}"):
        prepare_here(cfg, tokenizer)


def test_lines_that_are_whole_data_sets(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [{"data": pairs(3)}, {"data": pairs(3)}])
    with pytest.raises(UserError, match=r"2 of 2 rows are bad(?s:.*)one object with a list under 'data'"):
        prepare_here(make_config(tmp_path, {"path": str(path)}), tokenizer)


def test_kto_with_duplicates_and_a_test_set(tmp_path, tokenizer):
    rows = [
        {"prompt": "Q", "completion": text, "label": label} for text, label in [("a", True), ("a", 1), ("a", 0), ("b", "false")]
    ]
    train, test = (
        write_jsonl(tmp_path / "a.jsonl", rows),
        write_jsonl(tmp_path / "t.jsonl", [rows[2], {**rows[0], "completion": "c"}]),
    )
    cfg = make_config(
        tmp_path,
        {"path": str(train)},
        rl="kto",
        test_datasets=[{"path": str(test)}],
        val_set_size=0.5,
        dataset_exact_deduplication=True,
    )
    prepared = prepare_here(cfg, tokenizer)
    assert prepared.read(columns=["row_id", "completion", "label"]).to_pylist() == [
        {"row_id": 0, "completion": "a", "label": True},
        {"row_id": 2, "completion": "a", "label": False},
        {"row_id": 3, "completion": "b", "label": False},
    ]
    assert prepared.read("eval", ["row_id", "completion"]).to_pylist() == [{"row_id": 5, "completion": "c"}]
    assert [source["duplicates"] for source in prepared.manifest["sources"]] == [1, 1]


def test_rows_that_are_wrong_in_odd_ways_are_rejected_too(tmp_path, tokenizer):
    said = [{"role": "assistant", "content": "C"}]
    odd = [
        {"messages": [{"role": "user", "content": "half of a pair: \ud83d"}], "chosen": "C", "rejected": "R"},
        {"messages": [{"role": ["user"], "content": "P"}], "chosen": said, "rejected": "R"},
        {"messages": [{"role": "user", "content": "P"}], "chosen": "C", "rejected": "R", "tools": [{"function": "f"}]},
    ]
    good = [{"messages": [{"role": "user", "content": f"P{n}"}], "chosen": "C", "rejected": "R"} for n in range(5)]
    dataset = {"path": str(write_jsonl(tmp_path / "a.jsonl", odd + good)), "type": "chat_template.default"}
    prepared = prepare_here(make_config(tmp_path, dataset, max_rejected_fraction=0.5), tokenizer)
    assert prepared.train_rows == 5
    reasons = prepared.read("rejected")["reason"].to_pylist()
    for reason, words in zip(reasons, ("not valid Unicode", "unknown role ['user']", "must name its function"), strict=True):
        assert words in reason


def test_too_many_bad_rows(tmp_path, tokenizer):
    rows = [*pairs(94), *[{"prompt": "Q"}] * 6]
    cfg = make_config(tmp_path, {"path": str(write_jsonl(tmp_path / "a.jsonl", rows))}, max_rejected_fraction=0.05)
    with pytest.raises(UserError, match=r"max_rejected_fraction: 6 of 100 rows are bad, more than 0.05 allows") as caught:
        prepare_here(cfg, tokenizer)
    assert str(caught.value).count("a.jsonl row") == 5
    assert "a.jsonl row 95: no column 'chosen' (the row has prompt)" in str(caught.value)
    (rejected,) = (tmp_path / "prepared").glob("*/rejected/*.parquet")
    assert pq.read_table(rejected)["row_number"].to_pylist() == list(range(95, 101))

    prepared = prepare_here(make_config(tmp_path, *cfg.datasets, max_rejected_fraction=0.06), tokenizer)
    assert (prepared.train_rows, prepared.rejected_rows) == (94, 6)
    assert prepared.read("rejected")["row_number"].to_pylist() == list(range(95, 101))


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([], {}, r"datasets\[0\].path: .*a.jsonl. is empty"),
        (
            pairs(3),
            {"sequence_len": 5},
            r"none of 3 rows is left to train on \(3 have more than sequence_len 5 tokens, 0 are bad\)",
        ),
        (
            pairs(3),
            {"sequence_len": 5, "excess_length_strategy": "raise"},
            "excess_length_strategy: raise, and row 1 of .*a.jsonl",
        ),
        (pairs(3), {"val_set_size": 3}, "val_set_size: 3 takes 3 of 3 rows"),
        (
            pairs(3),
            {"dataset_prepared_path": "/dev/null/x"},
            "dataset_prepared_path: cannot write /dev/null.*: Not a directory",
        ),
    ],
)
def test_one_clear_message(tmp_path, tokenizer, rows, changes, message):
    cfg = make_config(tmp_path, {"path": str(write_jsonl(tmp_path / "a.jsonl", rows))}, **changes)
    with pytest.raises(UserError, match=message):
        prepare_here(cfg, tokenizer)


@pytest.mark.main_job
@pytest.mark.usefixtures("ray_session")
def test_an_error_of_a_task_comes_home_as_its_message(tmp_path, tokenizer):
    rows = write_jsonl(tmp_path / "a.jsonl", pairs(3))
    cfg = make_config(tmp_path, {"path": str(rows)}, sequence_len=5, excess_length_strategy="raise")
    with pytest.raises(UserError, match="^excess_length_strategy: raise, and row 1 of .*a.jsonl"):
        prepare(cfg, tokenizer)

    def fails(job, index):
        raise PermissionError(13, "Permission denied", "/data/part")
        yield {}

    with pytest.raises(UserError, match="^dataset_prepared_path: cannot write /data/part: Permission denied"):
        list(run_on_ray(fails, None, 1))


def test_conversations_without_a_template(tmp_path):
    from tests.tiny import tiny_tokenizer

    bare = tiny_tokenizer()
    bare.chat_template = None
    rows = [
        {
            "prompt": [{"role": "user", "content": "Q"}],
            "chosen": [{"role": "assistant", "content": text}],
            "rejected": [{"role": "assistant", "content": "R"}],
        }
        for text in "ab"
    ]
    cfg = make_config(tmp_path, {"path": str(write_jsonl(tmp_path / "a.jsonl", rows))})
    with pytest.raises(UserError, match="chat_template: the tokenizer has no chat template"):
        prepare_here(cfg, bare)


def test_a_folder_that_the_nodes_do_not_share(tmp_path, tokenizer):
    cfg = make_config(tmp_path, {"path": str(write_jsonl(tmp_path / "a.jsonl", pairs(3)))})
    elsewhere = [{"part": "part.parquet", "read": 3, "rows": 3}]
    with pytest.raises(UserError, match="give a URI such as s3://bucket/prepared, or a path on storage that all nodes share"):
        prepare(cfg, tokenizer, executor=lambda *args: iter(elsewhere))


@pytest.mark.main_job
@pytest.mark.usefixtures("ray_session")
def test_a_full_disk(tmp_path, tokenizer):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a small disk")
    try:
        noise = [{"prompt": os.urandom(500).hex(), "chosen": os.urandom(500).hex(), "rejected": "R"} for _ in range(200)]
        cfg = make_config(small, {"path": str(write_jsonl(tmp_path / "a.jsonl", noise))}, dataset_num_proc=1)
        with pytest.raises(UserError, match="dataset_prepared_path: no space left on the disk of .*what was complete stays"):
            prepare(cfg, tokenizer, rows_per_part=10)
        staged = list((small / "prepared").glob("*/staging/*"))
        assert staged and all(pq.read_table(path).num_rows == 10 for path in staged)
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)  # a task may be writing still


@pytest.mark.parametrize("harm", ["swapped", "missing", "cut"])
def test_a_store_that_was_changed_is_not_used(tmp_path, tokenizer, harm):
    cfg = make_config(tmp_path, {"path": str(write_jsonl(tmp_path / "a.jsonl", pairs(10)))})
    prepared = prepare_here(cfg, tokenizer)
    (file,) = prepared.train_files()
    if harm == "swapped":  # answers for each other: sizes stay what they are
        table = pq.read_table(file)
        names = [{"chosen_ids": "rejected_ids", "rejected_ids": "chosen_ids"}.get(name, name) for name in table.column_names]
        pq.write_table(table.rename_columns(names), file, compression="zstd")
    elif harm == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match="dataset_prepared_path: .* doesn't hold what was prepared: train/part-0.*; delete"):
        prepare_here(cfg, tokenizer)


def test_bad_rows_are_counted_whenever_a_store_is_opened(tmp_path, tokenizer):
    rows = [*pairs(9), {"prompt": "P", "chosen": None, "rejected": "B"}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    prepare_here(make_config(tmp_path, {"path": str(path)}, max_rejected_fraction=0.5), tokenizer)
    with pytest.raises(UserError, match=r"(?s)max_rejected_fraction: 1 of 10 rows are bad, more than 0.05 allows; .*row 10"):
        prepare_here(make_config(tmp_path, {"path": str(path)}, max_rejected_fraction=0.05), tokenizer)


RUN = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.pipeline.data.conftest import make_config
from tests.tiny import tiny_tokenizer
from pipeline.data import prepare

def with_a_stop(work, job, number, num_proc=None):
    for index in range(number):
        if index == 3:
            print("stopped", flush=True)
            sys.stdin.readline()
        yield from work(job, index)

cfg = make_config(Path({folder!r}), {{"path": {path!r}}})
print("done", prepare(cfg, tiny_tokenizer(), rows_per_part=10, executor=with_a_stop).train_rows, flush=True)
"""


def start(tmp_path, path):
    """A process that has prepared three of ten parts and goes on at a line of input; tasks run in it: its death is theirs."""
    code = RUN.format(root=str(ROOT), folder=str(tmp_path), path=str(path))
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "stopped\n"
    return process


@pytest.mark.processes
def test_a_killed_run_computes_only_what_is_missing(tmp_path, tokenizer, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", pairs(100))
    process = start(tmp_path, path)
    process.kill()
    process.communicate()
    staged = sorted((tmp_path / "prepared").glob("*/staging/*.parquet"))
    assert len(staged) == 3
    times = {file: file.stat().st_mtime_ns for file in staged}
    monkeypatch.setattr(Folder, "delete", lambda folder, name: None)
    prepared = prepare_here(make_config(tmp_path, {"path": str(path)}), tokenizer, rows_per_part=10)
    assert {file: file.stat().st_mtime_ns for file in staged} == times
    assert numbers(prepared) == list(range(100))


@pytest.mark.processes
def test_of_two_runs_one_waits(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", pairs(100))
    process = start(tmp_path, path)
    cfg = make_config(tmp_path, {"path": str(path)})

    def no_work(*_):
        raise AssertionError("the other one has done it")

    with ThreadPoolExecutor() as threads:
        said: list[Any] = []
        waiting = threads.submit(prepare, cfg, tokenizer, said.append, rows_per_part=10, executor=no_work)
        wait_for(lambda: any(f"process {process.pid} on " in wait for wait in waits))
        assert [state["waiting"] for state in said] == [f"process {process.pid} on {socket.gethostname()}"]
        assert process.communicate("\n")[0].endswith("done 100\n")
        assert numbers(waiting.result()) == list(range(100))


def test_who_lost_the_lease_writes_no_manifest(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_S", 0.01)
    root = tmp_path / "prepared"

    def lose(state):
        if state["parts_done"] == 2:
            (file,) = root.glob("*.lease")
            take_over(Folder(root), file.name, another())
            wait_for(lambda: not any(thread.name == "lease" for thread in threading.enumerate()))

    cfg = make_config(tmp_path, {"path": str(write_jsonl(tmp_path / "a.jsonl", pairs(30)))})
    with pytest.raises(RunFailed, match="^/.*/prepared was taken over by process 7 on node-7 while .*; nothing more is$"):
        prepare_here(cfg, tokenizer, progress=lose, rows_per_part=10)
    assert not [*root.glob("*/manifest.json")] and [*root.glob("*.lease")]


@pytest.mark.skipif(not SHARED_DATA.exists(), reason="the real data are not here")
@pytest.mark.parametrize("name", ["dpo_en_demo.json", "dpo_zh_demo.json"])
def test_real_pairs(tmp_path, tokenizer, name):
    dataset = {
        "path": str(SHARED_DATA / name),
        "type": "chat_template.default",
        "field_messages": "conversations",
        "message_property_mappings": {"role": "from", "content": "value"},
        "roles": {"user": ["human"], "assistant": ["gpt"]},
        "split": "train[:150]",
    }
    prepared = prepare_here(make_config(tmp_path, dataset, sequence_len=10**6), tokenizer)
    assert prepared.train_rows + prepared.rejected_rows == 150
    raw = json.loads((SHARED_DATA / name).read_text())
    for row in prepared.read().to_pylist()[::37]:
        given = raw[row["row_id"]]
        assert all(message["value"] in row["prompt"] for message in given["conversations"])
        assert tokenizer.decode(row["chosen_ids"]) == given["chosen"]["value"] + "<|im_end|>"


@pytest.mark.skipif(not SHARED_DATA.exists(), reason="the real data are not here")
def test_real_completions(tmp_path, tokenizer):
    dataset = {"path": str(SHARED_DATA / "kto_en_demo.json"), "type": "chat_template.default"}
    prepared = prepare_here(make_config(tmp_path, dataset, rl="kto", sequence_len=10**6), tokenizer)
    raw = json.loads((SHARED_DATA / "kto_en_demo.json").read_text())
    rows = prepared.read(columns=["row_id", "label", "completion"]).to_pylist()
    assert len(rows) + prepared.rejected_rows == 300
    assert all(row["label"] == raw[row["row_id"]]["label"] for row in rows)
    assert all(row["completion"] == raw[row["row_id"]]["messages"][-1]["content"] + "<|im_end|>" for row in rows)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["files"].pop(),
        lambda manifest: manifest["files"][0].update(rows=99),
        lambda manifest: manifest["files"][0].pop("sha256"),
        lambda manifest: manifest.clear(),
        None,
    ],
)
def test_a_manifest_that_was_changed_is_refused(tmp_path, tokenizer, change):
    cfg = make_config(tmp_path, {"path": str(write_jsonl(tmp_path / "a.jsonl", pairs(10)))}, val_set_size=3)
    file = prepare_here(cfg, tokenizer).path / "manifest.json"
    if change is None:
        file.write_text(file.read_text()[:100])
    else:
        manifest = json.loads(file.read_text())
        change(manifest)
        file.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest\.json isn't what was written there; delete the folder"):
        prepare_here(cfg, tokenizer)


def test_a_store_in_the_place_of_another_is_refused(tmp_path, tokenizer):
    cfg = make_config(tmp_path, {"path": str(write_jsonl(tmp_path / "a.jsonl", pairs(10)))})
    one, other = prepare_here(cfg, tokenizer), prepare_here(SimpleNamespace(**{**vars(cfg), "sequence_len": 999}), tokenizer)
    shutil.rmtree(other.path)
    shutil.copytree(one.path, other.path)
    with pytest.raises(UserError, match=r"manifest\.json isn't what was written there"):
        prepare_here(SimpleNamespace(**{**vars(cfg), "sequence_len": 999}), tokenizer)


def test_a_store_of_an_earlier_version_is_shown(tmp_path, tokenizer):
    """It has no checksums; what prepares data has another folder for them."""
    store = prepare_here(make_config(tmp_path, {"path": str(write_jsonl(tmp_path / "a.jsonl", pairs(10)))}), tokenizer)
    manifest = {**store.manifest, "format_version": 3}
    del manifest["checksum"]
    for entry in manifest["files"]:
        del entry["sha256"]
    (store.path / "manifest.json").write_text(json.dumps(manifest))
    assert open_store(store.path, verify=False).train_rows == open_store(store.path).train_rows == 10
