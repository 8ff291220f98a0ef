"""Scores in a bucket: the bytes of those at a path, reused and checked there, whatever happens to processes and objects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import boto3
import pytest

from pipeline import prepare, score
from pipeline.config import dump_config
from pipeline.errors import UserError
from pipeline.io.storage import Folder
from tests.killed_stages import kill_and_start_again, score_there, versions
from tests.pipeline.reference.conftest import ROWS_PER_TASK
from tests.s3 import Bucket


def contents(folder: Folder) -> dict[str, bytes]:
    return {name: folder.read_bytes(name) for name in folder.files()}


def test_scores_in_a_bucket_are_those_at_a_path(recipe: Any, prepared: Any, scores: Any, s3: Bucket) -> None:
    cfg = recipe(dataset_prepared_path=s3.uri("prepared"))
    there = prepare(cfg)
    assert there.fingerprint == prepared.fingerprint and there.manifest == prepared.manifest
    mine = score(cfg, there, rows_per_task=ROWS_PER_TASK)
    assert mine.path == s3.uri(f"prepared/reference/{scores.fingerprint}") and mine.scored_rows == 60
    assert contents(mine.folder) == contents(scores.folder)
    assert mine.read("eval").equals(scores.read("eval")) and mine.read().equals(scores.read())
    again = score(cfg, there)
    assert (again, again.forwards, again.scored_rows) == (again, 0, 0)
    # Another split of the same rows: all of them have been scored.
    other = recipe(dataset_prepared_path=s3.uri("prepared"), seed=99)
    assert score(other).scored_rows == 0
    changed, gone = mine.parts("train")[:2]
    flipped = bytearray(mine.folder.read_bytes(changed))
    flipped[-300] ^= 1
    mine.folder.write_bytes(changed, bytes(flipped))
    with pytest.raises(UserError, match=f"(?s)doesn't hold the scores that this recipe asks for.*{changed}: was changed"):
        mine.read()
    mine.folder.delete(gone)
    with pytest.raises(UserError, match=f"(?s){mine.path} doesn't hold the scores .*--recompute.*{gone}: is missing"):
        score(cfg, there)
    assert score(cfg, there, recompute=True, rows_per_task=ROWS_PER_TASK).scored_rows == 60
    assert contents(mine.folder) == contents(scores.folder)


@pytest.mark.driver
def test_killed_at_random_moments_they_are_computed_once(
    ray_session: Any, recipe: Any, scores: Any, s3: Bucket, tmp_path: Path
) -> None:
    """What was in flight is repeated: a task or two per kill, under the same names and with the same bytes."""
    boto3.Session().client("s3").put_bucket_versioning(Bucket=s3.name, VersioningConfiguration={"Status": "Enabled"})
    address = ray_session.get_runtime_context().gcs_address
    stores, kills = [], []

    def arguments(number: int) -> tuple[Any, ...]:
        file = tmp_path / f"{number}-{len(kills)}.yaml"
        kills.append(number)
        file.write_text(dump_config(recipe(dataset_prepared_path=s3.uri(f"prepared-{number}"))))
        return s3.variables, address, str(file), ROWS_PER_TASK

    def ended(number: int) -> None:
        place = f"prepared-{number}/reference/{scores.fingerprint}"
        stores.append(contents(Folder(s3.uri(place))))
        assert stores[-1] == contents(scores.folder)
        staged = {key: times for key, times in versions(s3).items() if key.startswith(f"{place}/staging/t")}
        starts = kills.count(number)
        assert sum(staged.values()) <= len(staged) + 2 * (starts - 1)

    kill_and_start_again(score_there, arguments, ended)
    assert len(stores) > 1
