"""Trackers as tests read them: a real MLflow server, W&B's offline files, trackio's store, TensorBoard's event files."""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

from tests.ports import unused_port
from tests.waiting import wait_for

__all__ = ["OfflineRun", "mlflow_server", "offline_runs", "scalars", "trackio_runs"]

BLOCK, WHOLE, LAST = 32768, 1, 4


@contextmanager
def mlflow_server(folder: Path, port: int | None = None) -> Iterator[str]:
    """MLflow's own server with a database in `folder`; yields its address."""
    port = port or unused_port()
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts")]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # which wants packages of its own
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        wait_for(lambda: _answers(f"{address}/health") or process.poll() is not None)
        assert process.poll() is None, (folder / "server.log").read_text()
        yield address
    finally:
        process.terminate()
        process.wait(timeout=60)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


@dataclass
class OfflineRun:
    """What one of W&B's offline folders holds."""

    id: str = ""
    name: str = ""
    group: str = ""
    project: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = None

    def steps_of(self, metric: str) -> list[int]:
        return [int(row["_step"]) for row in self.history if metric in row]


def offline_runs(folder: Path) -> list[OfflineRun]:
    """Of every `offline-run-*` in a folder, oldest first."""
    files = sorted(folder.glob("offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime)
    return [_offline_run(file) for file in files]


def _offline_run(file: Path) -> OfflineRun:
    found = OfflineRun()
    for data in _logged(file.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            found.id, found.name, found.group, found.project = run.run_id, run.display_name, run.run_group, run.project
            found.config.update({item.key: json.loads(item.value_json) for item in run.config.update})
        elif kind == "history":
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            found.history.append({"_step": record.history.step.num, **row})
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
    return found


def _logged(content: bytes) -> Iterator[bytes]:
    """Records of a log in LevelDB's format: blocks of 32 KiB, of parts with checksum, length, and place in their record."""
    place, data = 7, b""  # behind the file's own header
    while place + 7 <= len(content):
        left = BLOCK - place % BLOCK
        if left < 7:
            place += left
            continue
        _, length, part = struct.unpack("<IHB", content[place : place + 7])
        if part == 0:
            place += left
            continue
        data += content[place + 7 : place + 7 + length]
        place += 7 + length
        if part in (WHOLE, LAST):
            yield data
            data = b""


def trackio_runs(folder: Path, project: str) -> dict[str, dict[str, Any]]:
    """Runs of trackio's store by name: their `config`, and the steps of each metric."""
    found: dict[str, dict[str, Any]] = {}
    with closing(sqlite3.connect(folder / f"{project}.db")) as connection:
        for name, config in connection.execute("select run_name, config from configs"):
            found[name] = {"config": json.loads(config), "steps": {}}
        for name, step, text in connection.execute("select run_name, step, metrics from metrics order by step"):
            for metric in json.loads(text):
                found.setdefault(name, {"config": {}, "steps": {}})["steps"].setdefault(metric, []).append(step)
    return found


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of every scalar, of all event files in a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
