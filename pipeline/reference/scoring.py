"""Stage 2 as a whole: prepared pairs and a reference in, complete scores out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.engine import write_error
from pipeline.data.files import write_json
from pipeline.data.store import EVAL, MANIFEST, TRAIN, Prepared
from pipeline.errors import UserError
from pipeline.reference.actor import Job
from pipeline.reference.budget import check_budget, scoring_budget
from pipeline.reference.hashing import file_digest
from pipeline.reference.identity import pin_revision
from pipeline.reference.known import stage_others
from pipeline.reference.parts import Task, forwards_of, join_part, missing_rows, read_prepared, read_scores, staged_files
from pipeline.reference.plan import FORMAT_VERSION, Plan, make_plan
from pipeline.reference.pool import run_pool
from pipeline.reference.precision import resolve_precision
from pipeline.reference.store import Scores, open_scores

if TYPE_CHECKING:
    import pyarrow as pa

    from cluster.preflight import ActorPlan

__all__ = ["ROWS_PER_TASK", "actor_plan", "check_mode", "score"]

ROWS_PER_TASK = 128
"""Rows that an actor scores before it writes them: with the tokens, the grain of progress and of resuming."""
TOKENS_PER_TASK = 32_768
"""Tokens after which an actor writes, if the rows are long; a minute or two on a CPU. Never less than 8 forwards."""

Progress = Callable[[dict[str, Any]], None]


def score(
    cfg: Any,
    prepared: Prepared | None = None,
    progress: Progress | None = None,
    recompute: bool = False,
    rows_per_task: int = ROWS_PER_TASK,
    splits: Sequence[str] = (TRAIN, EVAL),
) -> Scores:
    """Score every prepared pair of `cfg` with the reference, or open the scores when they are there already.

    Rows whose token ids another complete run has scored with the same reference are copied from it. A killed run is continued
    where it stopped; of two runs that want the same scores one waits for the other. `progress` is called with
    `{"stage", "rows_done", "rows_total", "parts_done", "parts_total"}`, and once with `"waiting": True` in it before a wait.

    Args:
        cfg: the recipe.
        prepared: its prepared data; prepared here when None.
        recompute: delete what is there and compute every row again.
        splits: which rows; those of both splits, unless only some are asked for.

    Raises:
        UserError: for a method without a cached reference, a pair that doesn't fit the tokens of a forward, actors that
            don't fit the cluster, a reference that can't be loaded, log-probabilities that aren't finite, scores that were
            changed since they were written, or an unwritable folder.
        RunFailed: when an actor died again and again.
    """
    from pipeline.paths import absolute_paths

    check_mode(cfg)
    cfg = absolute_paths(cfg)
    if prepared is None:
        from pipeline.data import prepare

        prepared = prepare(cfg, progress=progress)
    check_budget(prepared, *scoring_budget(cfg))
    rows = sum(prepared.rows(split) for split in splits)
    actors = actor_plan(cfg, most=-(-rows // rows_per_task))
    plan = make_plan(cfg, prepared, resolve_precision(cfg, actors.use_gpu), splits)
    root = Path(os.path.expanduser(cfg.dataset_prepared_path)).absolute() / "reference"
    folder = root / plan.fingerprint
    if not recompute and (scores := open_scores(folder, plan)) is not None:
        return scores
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f"{plan.fingerprint}.lock", plan, progress):
            if recompute:
                shutil.rmtree(folder, ignore_errors=True)
            return open_scores(folder, plan) or _build(cfg, plan, actors, folder, progress, rows_per_task, not recompute)
    except OSError as error:
        raise UserError(write_error(error)) from error


@contextmanager
def _locked(file: Path, plan: Plan, progress: Progress | None) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if progress is not None:
            progress({"stage": "score", "waiting": True, **_done(0, plan, 0)})
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _done(rows: int, plan: Plan, parts: int) -> dict[str, int]:
    total = {"rows_total": sum(plan.parts.values()), "parts_total": len(plan.parts)}
    return {"rows_done": rows, "parts_done": parts, **total}


def check_mode(cfg: Any) -> None:
    """Raises UserError where the run has no cached reference, so that there is nothing to score."""
    from strategies.registry import get_strategy

    mode = get_strategy(cfg.rl).reference_mode(cfg)
    if mode is None:
        raise UserError(f"reference: rl: {cfg.rl} uses no reference; there is nothing to score")
    if mode == "live":
        remedy = "write `reference: cached`, or train without this stage" if cfg.reference else "train without this stage"
        raise UserError(f"reference: rl: {cfg.rl} keeps its reference in memory here; there is nothing to score: {remedy}")


def actor_plan(cfg: Any, most: int) -> ActorPlan:
    """The actors of `ray.score`, on the Ray that this starts or joins.

    Args:
        most: actors that there is work for.

    Raises:
        UserError: when they don't fit.
    """
    from cluster.preflight import plan_actors
    from pipeline.session import connect, node_resources

    connect(cfg)
    given = cfg.ray.score
    try:
        return plan_actors(given.num_actors, cfg.ray.use_gpu, given.actor_resources(), node_resources(), most)
    except ValueError as error:
        raise UserError(str(error)) from error


def _build(
    cfg: Any, plan: Plan, actors: ActorPlan, folder: Path, progress: Progress | None, rows_per_task: int, copy: bool
) -> Scores:
    """Compute what is missing. `copy` says whether rows that other scores hold are taken from there."""
    staging = folder / "staging"
    staging.mkdir(parents=True, exist_ok=True)
    tokens, key = scoring_budget(cfg)
    prepared = plan.prepared.path
    rows = {part: read_prepared(prepared, part) for part in plan.parts}
    left = {part: own for part, own in rows.items() if not _is_there(folder / part, own)}
    missing = {part: missing_rows(own, staged_files(staging, part).values()) for part, own in left.items()}
    if copy:
        stage_others(folder.parent, plan.inputs, staging, {part: own.take(missing[part]) for part, own in left.items()})
        missing = {
            part: missing_rows(own, staged_files(staging, part).values()) if missing[part] else [] for part, own in left.items()
        }
    tokens_per_task = max(TOKENS_PER_TASK, 8 * tokens)
    tasks = {part: plan.tasks(part, places, rows_per_task, tokens_per_task) for part, places in missing.items()}
    job = Job(
        cfg=pin_revision(cfg, plan.inputs["reference"]),
        prepared=prepared,
        staging=staging,
        tokens_per_forward=tokens,
        budget_key=key,
        precision=plan.precision,
        grown="grown_embeddings" in plan.inputs["reference"],
        use_gpu=actors.use_gpu,
        threads=max(1, int(actors.resources["CPU"])),
    )
    ran = _run(job, plan, tasks, lambda part: join_part(folder, staging, part, left[part]), actors, progress)
    _finish(plan, folder)
    shutil.rmtree(staging)
    scores = open_scores(folder, plan)
    assert scores is not None
    return replace(scores, **ran)


def _is_there(file: Path, rows: pa.Table) -> bool:
    """Whether an earlier run has left a part, and left it as it was written, with the scores of these rows."""
    scores = read_scores(file)
    return scores is not None and all(scores[name].equals(rows[name]) for name in rows.column_names)


def _run(
    job: Job,
    plan: Plan,
    tasks: dict[str, list[Task]],
    join: Callable[[str], None],
    actors: ActorPlan,
    progress: Progress | None,
) -> dict[str, Any]:
    """Run the tasks, join each part when all of its rows are staged; returns what `Scores` says of this run."""
    left = {part: len(own) for part, own in tasks.items()}
    to_do = [task for own in tasks.values() for task in own]
    known = sum(plan.parts.values()) - sum(task.size for task in to_do)
    forwards, rows, padded_because = 0, 0, None

    def close(part: str) -> None:
        join(part)
        del left[part]

    for part in [part for part, number in left.items() if not number]:
        close(part)
    for result in run_pool(job, to_do, actors) if to_do else ():
        forwards, rows = forwards + result["forwards"], rows + result["rows"]
        padded_because = result["padded_because"]
        left[result["part"]] -= 1
        if not left[result["part"]]:
            _check_shared(job.staging, tasks[result["part"]])
            close(result["part"])
        if progress is not None:
            progress({"stage": "score", **_done(known + rows, plan, len(plan.parts) - len(left))})
    return {"forwards": forwards, "scored_rows": rows, "padded_because": padded_because}


def _check_shared(staging: Path, tasks: list[Task]) -> None:
    if missing := next((file for task in tasks if not (file := task.staged(staging)).exists()), None):
        raise UserError(
            f"dataset_prepared_path: another node wrote {missing.name}, and it is not in {staging} here; "
            "the folder must be on storage that all nodes share"
        )


def _finish(plan: Plan, folder: Path) -> None:
    """Write, when all parts are in place, the manifest."""
    files = [
        {"file": part, "rows": rows, "bytes": (folder / part).stat().st_size, "sha256": file_digest(folder / part)}
        for part, rows in plan.parts.items()
    ]
    manifest = {
        "fingerprint": plan.fingerprint,
        "format_version": FORMAT_VERSION,
        "prepared": plan.prepared.fingerprint,
        # That were run for these parts, killed runs included: rows that were copied from other scores add none.
        "forwards": sum(forwards_of(folder / part) for part in plan.parts),
        "files": files,
        "inputs": plan.inputs,
    }
    write_json(manifest, folder / MANIFEST)
