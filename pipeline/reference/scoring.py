"""Entry point of stage 2: prepared pairs and a reference in, complete scores out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from cluster.placement import plan_actors
from pipeline.config import RunConfig
from pipeline.config.paths import absolute_paths
from pipeline.data import prepare
from pipeline.data.store import EVAL, MANIFEST, TRAIN, Prepared
from pipeline.errors import UserError
from pipeline.io.atomic import write_json
from pipeline.io.digests import as_written
from pipeline.ray.session import init_ray, node_resources
from pipeline.ray.tasks import write_error
from pipeline.reference.actor import Job, run_pool
from pipeline.reference.fingerprint import pin_revision
from pipeline.reference.pictures import check_pictures
from pipeline.reference.plan import FORMAT_VERSION, Plan, make_plan
from pipeline.reference.precision import resolve_precision
from pipeline.reference.reuse import reuse_existing_scores
from pipeline.reference.score_files import Task, forwards_of, join_part, missing_rows, read_prepared, read_scores, staged_files
from pipeline.reference.score_store import Scores, open_scores
from pipeline.reference.token_budget import check_budget, check_embeddings, check_positions, scoring_budget
from strategies.methods.registry import get_strategy

if TYPE_CHECKING:
    from cluster.placement import ActorPlan

__all__ = ["ROWS_PER_TASK", "actor_plan", "check_mode", "find_scores", "score"]

ROWS_PER_TASK = 128
"""Most rows of a task, after which an actor writes: the granularity of progress and of resuming."""
TOKENS_PER_TASK = 32_768
"""Most tokens of a task with long rows, a minute or two on a CPU; at least 8 forwards."""

Progress = Callable[[dict[str, Any]], None]


def score(
    cfg: RunConfig,
    prepared: Prepared | None = None,
    progress: Progress | None = None,
    recompute: bool = False,
    rows_per_task: int = ROWS_PER_TASK,
    splits: Sequence[str] = (TRAIN, EVAL),
) -> Scores:
    """Score every prepared pair of `cfg` with the reference, or open the scores if they are cached.

    Rows that the same reference has scored for other data are copied. An interrupted stage resumes; of two processes that
    compute the same scores, one waits for the other. `progress` is called with
    `{"stage", "rows_done", "rows_total", "parts_done", "parts_total"}`, and once with `"waiting": True` in it before a wait.

    Args:
        cfg: the recipe.
        prepared: its prepared data; prepared here when None.
        recompute: delete existing scores and compute every row again.
        splits: the splits to score, both by default.

    Raises:
        UserError: for a method without a cached reference, a pair that doesn't fit the tokens of a forward, actors that
            don't fit the cluster, a reference that can't be loaded, log-probabilities that aren't finite, scores that were
            changed since they were written, or an unwritable folder.
        RunFailed: when an actor died repeatedly.
    """
    check_mode(cfg)
    cfg = absolute_paths(cfg)
    if prepared is None:
        prepared = prepare(cfg, progress=progress)
    # Before Ray starts: what these find would otherwise end actors minutes later.
    check_budget(prepared, *scoring_budget(cfg))
    check_positions(cfg, prepared)
    check_embeddings(cfg, prepared)
    pictures = check_pictures(cfg, prepared)
    rows = sum(prepared.rows(split) for split in splits)
    # Before the plan: the precision, which is a part of the fingerprint, depends on whether actors have GPUs.
    actors = actor_plan(cfg, most=-(-rows // rows_per_task))
    plan = make_plan(cfg, prepared, resolve_precision(cfg, actors.use_gpu), splits, pictures)
    root = Path(os.path.expanduser(cfg.dataset_prepared_path)).absolute() / "reference"
    folder = root / plan.fingerprint
    # Without the lock: the manifest is written last, so what has one is complete.
    if not recompute and (scores := open_scores(folder, plan)) is not None:
        return scores
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f"{plan.fingerprint}.lock", plan, progress):
            if recompute:
                # The lock lies beside the folder, so it survives this.
                shutil.rmtree(folder, ignore_errors=True)
            # Another process may have completed them while this one waited for the lock.
            return open_scores(folder, plan) or _build(cfg, plan, actors, folder, progress, rows_per_task, not recompute)
    except OSError as error:
        raise UserError(write_error(error)) from error


def find_scores(cfg: RunConfig, prepared: Prepared) -> Scores | None:
    """Open the cached scores of `cfg`, of a recipe that `check_mode` allows, without Ray; None where there are none.

    Raises:
        UserError: when they were changed since they were written, or the reference can't be found.
    """
    cfg = absolute_paths(cfg)
    root = Path(os.path.expanduser(cfg.dataset_prepared_path)).absolute() / "reference"
    if not any(root.glob(f"*/{MANIFEST}")):
        return None
    pictures = check_pictures(cfg, prepared)
    # The precision depends on whether the actors had GPUs, which only a running cluster could say.
    precisions = dict.fromkeys(resolve_precision(cfg, use_gpu) for use_gpu in ((True,) if cfg.fp16 else (True, False)))
    plans = [make_plan(cfg, prepared, precision, pictures=pictures) for precision in precisions]
    return next((scores for plan in plans if (scores := open_scores(root / plan.fingerprint, plan)) is not None), None)


@contextmanager
def _locked(file: Path, plan: Plan, progress: Progress | None) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(file)
    try:
        # A first try without waiting, so that a wait can be shown.
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


def check_mode(cfg: RunConfig) -> None:
    """Raise UserError if the run has no cached reference, so that there is nothing to score."""
    mode = get_strategy(cfg.rl).reference_mode(cfg)
    if mode is None:
        raise UserError(f"reference: rl: {cfg.rl} uses no reference; there is nothing to score")
    if mode == "live":
        remedy = "write `reference: cached`, or train without this stage" if cfg.reference else "train without this stage"
        raise UserError(f"reference: rl: {cfg.rl} keeps its reference in memory here; there is nothing to score: {remedy}")


def actor_plan(cfg: RunConfig, most: int) -> ActorPlan:
    """Plan the actors of `ray.score`, starting or joining Ray.

    Args:
        most: number of actors that there are tasks for.

    Raises:
        UserError: when they don't fit the cluster.
    """
    init_ray(cfg)
    options = cfg.ray.score
    try:
        return plan_actors(options.num_actors, cfg.ray.use_gpu, options.actor_resources(), node_resources(), most)
    except ValueError as error:
        raise UserError(str(error)) from error


def _build(
    cfg: RunConfig, plan: Plan, actors: ActorPlan, folder: Path, progress: Progress | None, rows_per_task: int, copy: bool
) -> Scores:
    """Compute the missing rows and write complete scores; `copy` reuses rows of other scores."""
    staging = folder / "staging"
    staging.mkdir(parents=True, exist_ok=True)
    tokens, key = scoring_budget(cfg)
    prepared = plan.prepared.path
    # Rows are matched by the hash of their ids, so what a killed process staged is used even if tasks are cut otherwise now.
    rows = {part: read_prepared(prepared, part) for part in plan.parts}
    incomplete = {part: part_rows for part, part_rows in rows.items() if not _is_complete(folder / part, part_rows)}
    missing = {part: missing_rows(part_rows, staged_files(staging, part).values()) for part, part_rows in incomplete.items()}
    if copy:
        # Typed, since a run that was killed before it joined a part has left none of its rows missing.
        unstaged = {part: part_rows.take(pa.array(missing[part], pa.int64())) for part, part_rows in incomplete.items()}
        # Not with `recompute`, which is for scores that aren't trusted.
        reuse_existing_scores(folder.parent, plan.inputs, staging, unstaged)
        # Reused rows are staged now. Parts that were complete needn't be read again.
        missing = {
            part: missing_rows(part_rows, staged_files(staging, part).values()) if missing[part] else []
            for part, part_rows in incomplete.items()
        }
    tokens_per_task = max(TOKENS_PER_TASK, 8 * tokens)
    tasks = {part: plan.tasks(part, indices, rows_per_task, tokens_per_task) for part, indices in missing.items()}
    job = Job(
        # All actors load the commit whose hash is in the fingerprint, even if the repository moves meanwhile.
        cfg=pin_revision(cfg, plan.inputs["reference"]),
        prepared=prepared,
        staging=staging,
        tokens_per_forward=tokens,
        budget_key=key,
        precision=plan.precision,
        grown="grown_embeddings" in plan.inputs["reference"],
        use_gpu=actors.use_gpu,
        threads=max(1, int(actors.resources["CPU"])),
        pictures="pictures" in plan.inputs,
    )
    run_stats = _run(job, plan, tasks, lambda part: join_part(folder, staging, part, incomplete[part]), actors, progress)
    _finish(plan, folder)
    shutil.rmtree(staging)
    # Verifies what was written; its digests are cached, so no file is read again.
    scores = open_scores(folder, plan)
    assert scores is not None
    return replace(scores, **run_stats)


def _is_complete(file: Path, rows: pa.Table) -> bool:
    """Return whether a part is complete and undamaged, with the scores of exactly these rows."""
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
    """Run the tasks and join each part once all of its rows are staged; return the fields of `Scores` about this run."""
    tasks_left = {part: len(part_tasks) for part, part_tasks in tasks.items()}
    all_tasks = [task for part_tasks in tasks.values() for task in part_tasks]
    # Cached and reused rows count as done from the start.
    rows_before = sum(plan.parts.values()) - sum(task.size for task in all_tasks)
    forwards, rows, padded_because = 0, 0, None

    def close(part: str) -> None:
        join(part)
        del tasks_left[part]

    # Parts whose rows were all staged before: no result would ever close them.
    for part in [part for part, count in tasks_left.items() if not count]:
        close(part)
    for result in run_pool(job, all_tasks, actors) if all_tasks else ():
        forwards, rows = forwards + result["forwards"], rows + result["rows"]
        padded_because = result["padded_because"]
        tasks_left[result["part"]] -= 1
        # Join in the driver: staged files that another node wrote must be visible here.
        if not tasks_left[result["part"]]:
            _check_shared(job.staging, tasks[result["part"]])
            close(result["part"])
        if progress is not None:
            progress({"stage": "score", **_done(rows_before + rows, plan, len(plan.parts) - len(tasks_left))})
    return {"forwards": forwards, "scored_rows": rows, "padded_because": padded_because}


def _check_shared(staging: Path, tasks: list[Task]) -> None:
    if missing := next((file for task in tasks if not (file := task.staged(staging)).exists()), None):
        raise UserError(
            f"dataset_prepared_path: another node wrote {missing.name}, and it is not in {staging} here; "
            "the folder must be on storage that all nodes share"
        )


def _finish(plan: Plan, folder: Path) -> None:
    """Write the manifest, once all parts are complete."""
    files = [{"file": part, "rows": rows, **as_written(folder / part)} for part, rows in plan.parts.items()]
    manifest = {
        "fingerprint": plan.fingerprint,
        "format_version": FORMAT_VERSION,
        "prepared": plan.prepared.fingerprint,
        # All forwards run for these parts, those of killed runs too; reused rows add none.
        "forwards": sum(forwards_of(folder / part) for part in plan.parts),
        "files": files,
        "inputs": plan.inputs,
    }
    write_json(manifest, folder / MANIFEST)
