"""Formats, places and slices: every one gives the same rows, whole or cut into shards."""

from __future__ import annotations

import csv
import functools
import gzip
import http.server
import json
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from pipeline.data.sources.locate import locate
from pipeline.data.sources.readers import read_rows
from pipeline.data.sources.shards import survey
from pipeline.errors import UserError

ROWS = [{"id": str(number), "text": f"line one {number}\nline two, 'ä'"} for number in range(23)]
NAMES = ["a.jsonl", "lines.json", "array.json", "a.csv", "a.parquet", "stream.arrow", "file.feather"]


def write(folder: Path, name: str, rows=ROWS) -> Path:
    path = folder / name
    if name in ("a.jsonl", "lines.json"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif name == "array.json":
        path.write_text(json.dumps(rows, indent=1))
    elif name == "a.csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=4)
    elif name == "stream.arrow":
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(path, table.schema) as sink:
            sink.write_table(table, max_chunksize=7)
    else:
        pyarrow.feather.write_feather(pa.Table.from_pylist(rows), path, chunksize=7)
    return path


def read(dataset, rows_per_part=5):
    """(index, value) of every row, over all shards in order."""
    return [(row.index, row.value) for shard in survey(dataset, 0, rows_per_part).shards for row in read_rows(shard)]


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_formats(tmp_path, name, gz):
    path = write(tmp_path, name)
    if gz:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path = path.with_name(path.name + ".gz")
    assert read({"path": str(path)}) == list(enumerate(ROWS))


@pytest.mark.parametrize(
    ("name", "shards"), [("a.jsonl", 5), ("lines.json", 5), ("a.parquet", 3), ("stream.arrow", 5), ("a.csv", 1)]
)
def test_shards_follow_from_the_data(tmp_path, name, shards):
    source = survey({"path": str(write(tmp_path, name))}, 0, 5)
    assert len(source.shards) == shards
    assert source.rows == (None if name == "a.csv" else 23)


@pytest.mark.parametrize("name", NAMES)
def test_slices(tmp_path, name):
    path = str(write(tmp_path, name))
    assert read({"path": path, "split": "train[7:12]"}) == list(enumerate(ROWS))[7:12]
    assert read({"path": path, "split": "train[20:]"}) == list(enumerate(ROWS))[20:]
    assert read({"path": path, "split": "train[:3]"}) == list(enumerate(ROWS))[:3]


def test_a_line_number_counts_blank_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}\n\n[3]\n{"a": 4')
    (shard,) = survey({"path": str(path)}, 0, 100).shards
    rows = list(read_rows(shard))
    assert [(row.index, row.value) for row in rows] == [(0, {"a": 1}), (2, {"a": 2}), (4, None), (5, None)]
    assert rows[2].fault == "must be an object, got list"
    assert rows[3].fault.startswith("does not parse as JSON: Expecting")
    assert rows[3].raw == '{"a": 4'


def test_a_csv_row_with_missing_cells(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n1,2\n3\n")
    (shard,) = survey({"path": str(tmp_path / "a.csv")}, 0, 100).shards
    assert [row.fault for row in read_rows(shard)] == ["", "has 1 cells, the header has 2"]


def test_a_broken_array_says_where(tmp_path):
    (tmp_path / "a.json").write_text('[{"a": 1}, {"a": 2}, {"a"')
    with pytest.raises(UserError, match=r"a.json: does not parse as JSON after row 2"):
        read({"path": str(tmp_path / "a.json")})


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_file_that_is_not_what_it_is_called(tmp_path, name):
    (tmp_path / name).write_bytes(b"nonsense, and not a little of it")
    with pytest.raises(UserError, match=f"cannot read '.*{name}' as |'.*{name}' is no Parquet"):
        read({"path": str(tmp_path / name)})


def test_keys_that_an_object_lacks_stay_away(tmp_path):
    """Arrow gives every struct of a column every key; a template would print them."""
    calls = [{"role": "assistant", "content": None, "args": {"x": 1}}, {"role": "user", "content": "q", "args": {"y": "s"}}]
    pq.write_table(pa.Table.from_pylist([{"m": calls, "other": None}]), tmp_path / "a.parquet")
    assert read({"path": str(tmp_path / "a.parquet")}) == [(0, {"m": calls, "other": None})]


def test_json_columns_of_datasets_are_parsed(tmp_path):
    from datasets import Dataset, Features, Json, List

    mixed = [{"x": 1}, {"y": ["s"]}]
    Dataset.from_dict({"a": [mixed]}, features=Features({"a": List(Json())})).save_to_disk(tmp_path / "saved")
    assert read({"path": str(tmp_path / "saved")}) == [(0, {"a": mixed})]


def test_save_to_disk(tmp_path):
    from datasets import Dataset, DatasetDict

    splits = {"train": Dataset.from_list(ROWS), "small": Dataset.from_list(ROWS[:4])}
    DatasetDict(splits).save_to_disk(tmp_path / "all", num_shards={"train": 3, "small": 1})
    assert [value for _, value in read({"path": str(tmp_path / "all")})] == ROWS
    assert [value for _, value in read({"path": str(tmp_path / "all"), "split": "small"})] == ROWS[:4]
    with pytest.raises(UserError, match="has no split 'test'; it has: train, small"):
        read({"path": str(tmp_path / "all"), "split": "test"})


def test_folders_and_data_files(tmp_path):
    (tmp_path / "sub").mkdir()
    for name, rows in [("b.jsonl", ROWS[:2]), ("a.jsonl", ROWS[2:4]), ("sub/c.jsonl", ROWS[4:6])]:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "README.md").write_text("not data")

    def names(**keys):
        return [Path(file.location).name for file in locate({"path": str(tmp_path), **keys})]

    assert names() == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert names(data_files="b.jsonl") == ["b.jsonl"]
    assert names(data_files=["sub/*.jsonl", "a.jsonl"]) == ["c.jsonl", "a.jsonl"]
    with pytest.raises(UserError, match="data_files: 'x.jsonl' matches no file in"):
        names(data_files="x.jsonl")
    with pytest.raises(UserError, match="holds no csv files"):
        names(ds_type="csv")


def test_path_as_a_pattern(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"n": 2}\n')
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n')
    assert [value["n"] for _, value in read({"path": f"{tmp_path}/*.jsonl"})] == [1, 2]
    with pytest.raises(UserError, match=r"path: no such file: '.*\*.csv'"):
        read({"path": f"{tmp_path}/*.csv"})


def test_path_as_the_name_of_a_format(tmp_path):
    write(tmp_path, "a.jsonl")
    for files in (str(tmp_path / "a.jsonl"), [str(tmp_path / "*.jsonl")]):
        assert read({"path": "json", "data_files": files}) == list(enumerate(ROWS))
    with pytest.raises(UserError, match="data_files: no such file: '.*b.jsonl'"):
        read({"path": "json", "data_files": str(tmp_path / "b.jsonl")})


def test_ds_type_wins_over_the_extension(tmp_path):
    write(tmp_path, "a.jsonl").rename(tmp_path / "a.txt")
    assert read({"path": str(tmp_path / "a.txt"), "ds_type": "jsonl"}) == list(enumerate(ROWS))
    with pytest.raises(UserError, match="cannot tell the format of '.*a.txt'; set ds_type to one of json, jsonl, csv"):
        read({"path": str(tmp_path / "a.txt")})
    with pytest.raises(UserError, match="ds_type: must be one of json, .*got 'text'"):
        read({"path": str(tmp_path / "a.txt"), "ds_type": "text"})


@pytest.mark.parametrize("path", ["./nothing.jsonl", "nothing.jsonl", "/nothing/at/all", "file:///nothing.jsonl"])
def test_a_missing_file(path):
    with pytest.raises(UserError, match=f"path: no such file or folder: '{path}'"):
        read({"path": path})


def test_a_split_that_files_do_not_have(tmp_path):
    path = str(write(tmp_path, "a.jsonl"))
    with pytest.raises(UserError, match=r"split: got 'train\[:10%\]'; files take 'train' or a slice"):
        read({"path": path, "split": "train[:10%]"})
    with pytest.raises(UserError, match=r"split: got 'test', but files of '.*a.jsonl' have one split, 'train'"):
        read({"path": path, "split": "test"})


def test_the_hub_out_of_reach(monkeypatch):
    import datasets

    def load_dataset(**keys):
        assert keys == {"path": "some/pairs", "name": "en", "split": "test", "revision": None, "data_files": ["x"]}
        raise ConnectionError("Couldn't reach 'some/pairs' on the Hub\nand so on")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = "'some/pairs' is no local file or folder, and loading it from the Hugging Face hub failed: Couldn't reach"
    with pytest.raises(UserError, match=message):
        read({"path": "some/pairs", "name": "en", "split": "test", "data_files": ["x"]})


def test_the_hub(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda **keys: datasets.Dataset.from_list(ROWS))
    assert read({"path": "some/other-pairs"}) == list(enumerate(ROWS))


@pytest.fixture
def web(tmp_path):
    """A folder served over HTTP."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def test_http(tmp_path, web):
    path = write(tmp_path, "a.jsonl")
    assert read({"path": f"{web}/a.jsonl"}) == list(enumerate(ROWS))
    before = survey({"path": f"{web}/a.jsonl"}, 0, 5).identity
    path.write_text(path.read_text().replace("line one 3", "line one 4"))
    assert survey({"path": f"{web}/a.jsonl"}, 0, 5).identity != before
    with pytest.raises(UserError, match=r"path: (no such file|cannot reach)"):
        read({"path": f"{web}/b.jsonl"})


def test_s3(tmp_path, monkeypatch):
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        query = f"?endpoint_override={host}:{port}&scheme=http&region=us-east-1&allow_bucket_creation=true"
        filesystem, _ = pa.fs.FileSystem.from_uri(f"s3://bucket/x{query}")
        filesystem.create_dir("bucket")
        for name in ("a.jsonl", "a.parquet"):
            with filesystem.open_output_stream(f"bucket/data/{name}") as stream:
                stream.write(write(tmp_path, name).read_bytes())
            assert read({"path": f"s3://bucket/data/{name}{query}"}) == list(enumerate(ROWS))
        assert read({"path": f"s3://bucket/data{query}", "data_files": "*.parquet"}) == list(enumerate(ROWS))
        with pytest.raises(UserError, match=r"no such file or folder: 's3://bucket/data/b.jsonl"):
            read({"path": f"s3://bucket/data/b.jsonl{query}"})
    finally:
        server.stop()


def test_an_unknown_scheme():
    with pytest.raises(UserError, match="cannot open 'nope://x/y.jsonl': Protocol not known: nope"):
        read({"path": "nope://x/y.jsonl"})
