"""Scores in a bucket: the bytes of those at a path, reused and checked there, whatever happens to processes and objects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import boto3
import pytest

from pipeline import prepare, score
from pipeline.config import dump_config
from pipeline.errors import UserError
from pipeline.io import filesystems
from pipeline.io.storage import Folder
from tests.killed_stages import kill_and_start_again, score_there, versions
from tests.pipeline.reference.conftest import ROWS_PER_TASK
from tests.s3 import Bucket, S3Server


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


def test_a_bucket_that_goes_away_while_it_scores_keeps_what_was_complete(
    recipe: Any, scores: Any, own_s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The limit of this process is that of its actors, too.
    monkeypatch.setattr(filesystems, "S3_ATTEMPTS", 2)
    prepared = prepare(cfg := recipe(dataset_prepared_path=own_s3.uri("prepared")))

    def away_after_one(state: dict[str, Any]) -> None:
        if state["rows_done"] and own_s3.is_running:
            own_s3.stop()

    with pytest.raises(
        UserError, match=r"^dataset_prepared_path: .* can't be reached: .*AWS Error.*; what was complete stays, so run again$"
    ):
        score(cfg, prepared, away_after_one, rows_per_task=ROWS_PER_TASK)
    own_s3.start()
    staged = [key for key in own_s3.objects() if "/staging/" in key]
    assert staged
    again = score(cfg, rows_per_task=ROWS_PER_TASK)
    assert 0 < again.scored_rows <= 60 - ROWS_PER_TASK // 2
    assert contents(again.folder) == contents(scores.folder)


@pytest.mark.driver
def test_killed_at_random_moments_they_are_computed_once(
    ray_session: Any, recipe: Any, scores: Any, s3: Bucket, tmp_path: Path
) -> None:
    """What was in flight is repeated: a task or two per kill, under the same names and with the same bytes."""
    boto3.Session().client("s3").put_bucket_versioning(Bucket=s3.name, VersioningConfiguration={"Status": "Enabled"})
    prepare(cfg := recipe(dataset_prepared_path=s3.uri("prepared")))
    (tmp_path / "recipe.yaml").write_text(dump_config(cfg))
    root, stores, starts = Folder(s3.uri("prepared")), [], []
    before: dict[str, int] = {}

    def arguments(number: int) -> tuple[Any, ...]:
        starts.append(number)
        return s3.variables, ray_session.get_runtime_context().gcs_address, str(tmp_path / "recipe.yaml"), ROWS_PER_TASK

    def ended(number: int) -> None:
        stores.append(contents(root.subfolder(f"reference/{scores.fingerprint}")))
        assert stores[-1] == contents(scores.folder)
        times = [count - before.get(key, 0) for key, count in versions(s3).items() if "/staging/t" in key]
        assert sum(times) <= sum(count > 0 for count in times) + 2 * (starts.count(number) - 1)
        before.update(versions(s3))
        root.delete("reference")

    kill_and_start_again(score_there, arguments, ended)
    assert len(stores) > 1
