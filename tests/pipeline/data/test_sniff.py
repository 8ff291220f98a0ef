"""Files as people have them: packed, encoded, wrapped; and what is no data."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.sources.readers import read_rows
from pipeline.data.sources.shards import survey
from pipeline.errors import UserError

ROWS = [{"prompt": f"Größe {number}?", "chosen": "a", "rejected": "b"} for number in range(5)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def rows_of(path: Path, **keys: Any) -> list[Any]:
    shards = survey({"path": str(path), **keys}, 0, 2).shards
    return [row.value for shard in shards for row in read_rows(shard)]


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, zstd], ids=["gzip", "bz2", "xz", "zstd"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json.xz", "rows.ndjson.bz2", "rows.jsonl.zst"])
def test_packed_whatever_the_name(tmp_path: Path, pack: Any, name: str) -> None:
    (tmp_path / name).write_bytes(pack(LINES.encode()))
    assert rows_of(tmp_path / name) == ROWS


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-8-sig"])
@pytest.mark.parametrize("form", ["jsonl", "json", "csv"])
def test_encodings(tmp_path: Path, encoding: str, form: str) -> None:
    csv = "prompt,chosen,rejected\n" + "".join(f"{row['prompt']},a,b\n" for row in ROWS)
    text = {"jsonl": LINES, "json": json.dumps(ROWS, ensure_ascii=False), "csv": csv}[form]
    (tmp_path / f"rows.{form}").write_bytes(text.encode(encoding))
    assert rows_of(tmp_path / f"rows.{form}") == ROWS


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("wrap", [lambda rows: rows, lambda rows: {"data": rows}, lambda rows: {"version": "1", "rows": rows}])
def test_arrays_and_lists_within_objects(tmp_path: Path, name: str, indent: int | None, wrap: Any) -> None:
    (tmp_path / name).write_text(json.dumps(wrap(ROWS), indent=indent))
    assert rows_of(tmp_path / name) == ROWS


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1]])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_objects_over_many_lines(tmp_path: Path, name: str, rows: list[Any]) -> None:
    (tmp_path / name).write_text("\n".join(json.dumps(row, indent=2) for row in rows))
    assert rows_of(tmp_path / name) == rows


def test_one_row_with_a_list(tmp_path: Path) -> None:
    """A conversation is no list of rows: its messages lie two deep, beside the answers."""
    row = {"prompt": [{"role": "user", "content": "Q"}], "chosen": "a", "rejected": "b"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    assert rows_of(tmp_path / "rows.jsonl") == [row, row]
    (tmp_path / "one.jsonl").write_text(json.dumps(row) + "\n")
    assert rows_of(tmp_path / "one.jsonl") == [row]


def test_one_row_with_lists_of_objects(tmp_path: Path) -> None:
    row = {"context": [{"role": "user", "content": "Q"}], "response1": "a", "individual_preference": [{"score": 1}]}
    (tmp_path / "one.jsonl").write_text(json.dumps(row) + "\n")
    assert rows_of(tmp_path / "one.jsonl") == [row]


@pytest.mark.parametrize("line", ["[" * 60_000 + "]" * 60_000, '{"prompt": ' + "9" * 5000 + "}"], ids=["brackets", "digits"])
def test_a_line_that_no_reader_takes_is_one_bad_row(tmp_path: Path, line: str) -> None:
    (tmp_path / "rows.jsonl").write_text(LINES + line + "\n" + LINES)
    assert rows_of(tmp_path / "rows.jsonl") == [*ROWS, None, *ROWS]


def test_a_bad_first_line_is_one_bad_row(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "cut\n' + LINES)
    assert rows_of(tmp_path / "rows.jsonl") == [None, *ROWS]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "is a pointer of Git LFS.*git lfs pull"),
        (b"", "is empty"),
        (b"PK\x03\x04rest", "is a zip archive; unpack it"),
        (b'{"train": [{"a": 1}], "test": [{"a": 2}]}', r"several lists of rows \(train, test\)"),
        (b'{\n  "data": [\n    {"prompt": "a"', "does not parse as JSON.*it may be cut off"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=reason):
        rows_of(tmp_path / "rows.jsonl")


def test_a_packed_file_that_is_cut_off(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl.xz").write_bytes(lzma.compress(LINES.encode() * 50)[:-20])
    with pytest.raises(UserError, match="cannot read .*rows.jsonl.xz' as jsonl"):
        rows_of(tmp_path / "rows.jsonl.xz")


class TestSplits:
    """The splits of a folder, as `datasets` finds them."""

    def write(self, folder: Path, *names: str) -> Path:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist([{"name": name}]), folder / name)
        return folder

    def names(self, folder: Path, **keys: Any) -> list[str]:
        return [row["name"] for row in rows_of(folder, **keys)]

    SHARDED = ("data/train_prefs-00000-of-00001.parquet", "data/test_prefs-00000-of-00001.parquet")

    def test_of_shards(self, tmp_path: Path) -> None:
        folder = self.write(tmp_path, *self.SHARDED)
        assert self.names(folder, split="train_prefs") == [self.SHARDED[0]]
        assert self.names(folder, split="test_prefs[:1]") == [self.SHARDED[1]]
        with pytest.raises(UserError, match="has no split 'train'; it has: test_prefs, train_prefs"):
            self.names(folder)

    @pytest.mark.parametrize(
        ("train", "test"),
        [("train.parquet", "test.parquet"), ("my-train-2.parquet", "my-eval.parquet"), ("train/a.parquet", "dev/a.parquet")],
    )
    def test_of_names(self, tmp_path: Path, train: str, test: str) -> None:
        assert self.names(self.write(tmp_path, train, test)) == [train]

    def test_no_word_of_a_split(self, tmp_path: Path) -> None:
        assert self.names(self.write(tmp_path, "a.parquet", "trains.parquet")) == ["a.parquet", "trains.parquet"]

    def test_of_a_card(self, tmp_path: Path) -> None:
        folder = self.write(tmp_path, "en/a.parquet", "en/b.parquet", "de/a.parquet")
        files = {name: [{"split": split, "path": f"{name}/{split}*"} for split in ("a", "b")] for name in ("en", "de")}
        configs = [{"config_name": name, "data_files": entries} for name, entries in files.items()]
        (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n# A card\n")
        assert self.names(folder, name="en", split="a") == ["en/a.parquet"]
        assert self.names(folder, name="en", split="b") == ["en/b.parquet"]
        with pytest.raises(UserError, match="name: .* has the configurations en, de"):
            self.names(folder)

    def test_a_card_with_folders(self, tmp_path: Path) -> None:
        folder = self.write(tmp_path, "p/a.parquet", "q/a.parquet")
        configs = [{"config_name": name, "data_dir": name} for name in ("p", "q")]
        (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
        assert self.names(folder, name="q") == ["q/a.parquet"]

    @pytest.mark.parametrize(
        ("data_files", "expected"),
        [
            ("*.parquet", ["a.parquet"]),
            ("**.parquet", ["a.parquet", "sub/b.parquet"]),
            ({"train": "sub/*"}, ["sub/b.parquet"]),
            ([{"split": "train", "path": "a*"}, {"split": "train", "path": "sub/*"}], ["a.parquet", "sub/b.parquet"]),
        ],
    )
    def test_patterns_of_a_card(self, tmp_path: Path, data_files: Any, expected: list[str]) -> None:
        folder = self.write(tmp_path, "a.parquet", "sub/b.parquet")
        configs = [{"config_name": "default", "data_files": data_files}]
        (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
        assert self.names(folder) == expected

    def test_a_card_whose_file_is_missing(self, tmp_path: Path) -> None:
        folder = self.write(tmp_path, "a.parquet")
        (folder / "README.md").write_text("---\nconfigs: [{config_name: default, data_files: b.parquet}]\n---\n")
        with pytest.raises(UserError, match="names 'b.parquet', and there is no such file"):
            self.names(folder)

    def test_folders_come_before_files(self, tmp_path: Path) -> None:
        folder = self.write(tmp_path, "train/test.parquet", "train/x.parquet")
        assert self.names(folder) == ["train/test.parquet", "train/x.parquet"]

    def test_what_is_no_data(self, tmp_path: Path) -> None:
        folder = self.write(tmp_path, "a.parquet", ".cache/b.parquet", "__pycache__/c.parquet")
        (folder / "dataset_infos.json").write_text('{"default": {}}')
        assert self.names(folder) == ["a.parquet"]
