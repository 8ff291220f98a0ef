"""Stages with everything in a bucket, in processes that are killed at random moments and started again."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3

from pipeline.config import load_config
from pipeline.data import prepare
from pipeline.ray.tasks import run_here
from pipeline.reference import score
from tests.pipeline.data.conftest import make_config
from tests.s3 import Bucket
from tests.tiny import tiny_tokenizer

__all__ = ["kill_and_start_again", "number_of_kills", "prepare_there", "run", "score_there", "versions"]

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])
Stage = Callable[..., None]


def number_of_kills() -> int:
    """2, or what PREFRAY_KILLS says."""
    return int(os.environ.get("PREFRAY_KILLS", "2"))


def prepare_there(variables: dict[str, str], uri: str, data: str, rows_per_part: int) -> None:
    """Prepare rows in this process."""
    os.environ.update(variables)
    cfg = make_config(Path(), {"path": data}, dataset_prepared_path=uri, val_set_size=0.1)
    prepare(cfg, tiny_tokenizer(), rows_per_part=rows_per_part, executor=run_here)


def score_there(variables: dict[str, str], address: str, recipe: str, rows_per_task: int) -> None:
    """Prepare and score the rows of a recipe on a running Ray."""
    import ray

    os.environ.update(variables)
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    score(load_config(recipe), rows_per_task=rows_per_task)


def kill_and_start_again(stage: Stage, arguments: Callable[[int], tuple[Any, ...]], ended: Callable[[int], None]) -> None:
    """Kill a stage `number_of_kills` times, each time at a random moment, and start it again, until it has ended.

    Args:
        arguments: of a number, those of the stage in a place of that number, of which nothing is there yet.
        ended: called with the number whenever the stage has come to its end.
    """
    first = CONTEXT.Process()
    first.start()  # and with it the server, which imports: that time isn't the stage's
    first.join()
    number, seconds = 1, run(stage, arguments(0))
    ended(0)
    moments, kills = random.Random(0), number_of_kills()
    while kills:
        if _is_killed(stage, arguments(number), moments.uniform(0.0, seconds)):
            kills -= 1
        else:
            ended(number)
            number += 1
    run(stage, arguments(number))
    ended(number)


def run(stage: Stage, arguments: tuple[Any, ...]) -> float:
    """Run a stage in a process of its own; return its seconds."""
    start, process = time.monotonic(), _started(stage, arguments)
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - start


def _is_killed(stage: Stage, arguments: tuple[Any, ...], seconds: float) -> bool:
    process = _started(stage, arguments)
    process.join(seconds)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def _started(stage: Stage, arguments: tuple[Any, ...]) -> Any:
    process = CONTEXT.Process(target=stage, args=arguments)
    process.start()
    return process


def versions(bucket: Bucket) -> dict[str, int]:
    """Return key -> how many times it was written, deleted objects included."""
    counts: dict[str, int] = {}
    for page in boto3.Session().client("s3").get_paginator("list_object_versions").paginate(Bucket=bucket.name):
        for entry in page.get("Versions", []):
            counts[entry["Key"]] = counts.get(entry["Key"], 0) + 1
    return counts
