"""Stage 2 as a whole: prepared pairs and a reference in, complete scores out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.engine import write_error
from pipeline.data.files import write_json
from pipeline.data.store import MANIFEST, Prepared
from pipeline.errors import UserError
from pipeline.reference.actor import Job
from pipeline.reference.budget import check_budget, scoring_budget
from pipeline.reference.hashing import file_digest
from pipeline.reference.identity import pin_revision
from pipeline.reference.parts import Task, check_part, forwards_of, join_part
from pipeline.reference.plan import FORMAT_VERSION, Plan, make_plan
from pipeline.reference.pool import run_pool
from pipeline.reference.precision import resolve_precision
from pipeline.reference.store import Scores, open_scores

if TYPE_CHECKING:
    from cluster.preflight import ActorPlan

__all__ = ["ROWS_PER_TASK", "check_mode", "score"]

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
) -> Scores:
    """Score every prepared pair of `cfg` with the reference, or open the scores when they are there already.

    A killed run is continued where it stopped; of two runs that want the same scores one waits for the other. `progress`
    is called with `{"stage", "rows_done", "rows_total", "parts_done", "parts_total"}`.

    Args:
        cfg: the recipe.
        prepared: its prepared data; prepared here when None.
        recompute: delete what is there and compute again.

    Raises:
        UserError: for a method without a cached reference, a pair that doesn't fit the tokens of a forward, actors that
            don't fit the cluster, a reference that can't be loaded, log-probabilities that aren't finite, scores that were
            changed since they were written, or an unwritable folder.
        RunFailed: when an actor died again and again.
    """
    from filelock import FileLock

    from pipeline.paths import absolute_paths

    check_mode(cfg)
    cfg = absolute_paths(cfg)
    if prepared is None:
        from pipeline.data import prepare

        prepared = prepare(cfg, progress=progress)
    check_budget(prepared, *scoring_budget(cfg))
    actors = _actors(cfg, most=-(-(prepared.train_rows + prepared.eval_rows) // rows_per_task))
    plan = make_plan(cfg, prepared, resolve_precision(cfg, actors.use_gpu))
    root = Path(cfg.dataset_prepared_path).expanduser().absolute() / "reference"
    folder = root / plan.fingerprint
    if not recompute and (scores := open_scores(folder, plan)) is not None:
        return scores
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{plan.fingerprint}.lock"):
            if recompute:
                shutil.rmtree(folder, ignore_errors=True)
            return open_scores(folder, plan) or _build(cfg, plan, actors, folder, progress, rows_per_task)
    except OSError as error:
        raise UserError(write_error(error)) from error


def check_mode(cfg: Any) -> None:
    """Raises UserError where the run has no cached reference, so that there is nothing to score."""
    from strategies.registry import get_strategy

    mode = get_strategy(cfg.rl).reference_mode(cfg)
    if mode is None:
        raise UserError(f"reference: rl: {cfg.rl} uses no reference; there is nothing to score")
    if mode == "live":
        remedy = "write `reference: cached`, or train without this stage" if cfg.reference else "train without this stage"
        raise UserError(f"reference: rl: {cfg.rl} keeps its reference in memory here; there is nothing to score: {remedy}")


def _actors(cfg: Any, most: int) -> ActorPlan:
    from cluster.preflight import plan_actors
    from pipeline.session import connect, node_resources

    connect(cfg)
    given = cfg.ray.score
    try:
        return plan_actors(given.num_actors, cfg.ray.use_gpu, given.actor_resources(), node_resources(), most)
    except ValueError as error:
        raise UserError(str(error)) from error


def _build(cfg: Any, plan: Plan, actors: ActorPlan, folder: Path, progress: Progress | None, rows_per_task: int) -> Scores:
    staging = folder / "staging"
    staging.mkdir(parents=True, exist_ok=True)
    tokens, key = scoring_budget(cfg)
    tasks = plan.tasks(rows_per_task, max(TOKENS_PER_TASK, 8 * tokens))
    prepared = plan.prepared.path
    there = [part for part in tasks if (folder / part).exists()]
    for part in there:
        check_part(prepared, folder, part)
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
    left = {part: own for part, own in tasks.items() if part not in there}
    forwards, rows = _run(job, plan, left, actors, folder, progress)
    _finish(plan, folder)
    shutil.rmtree(staging)
    scores = open_scores(folder, plan)
    assert scores is not None
    return Scores(scores.path, scores.fingerprint, scores.train_rows, scores.eval_rows, scores.manifest, forwards, rows)


def _run(
    job: Job, plan: Plan, left: dict[str, list[Task]], actors: ActorPlan, folder: Path, progress: Progress | None
) -> tuple[int, int]:
    """Run the tasks that aren't staged, join each part when its last task is; returns forwards and rows of this run."""
    missing = {part: [task for task in own if not task.staged(job.staging).exists()] for part, own in left.items()}
    open_tasks = {part: len(own) for part, own in missing.items()}
    rows_left = sum(task.stop - task.start for own in missing.values() for task in own)
    total = sum(plan.parts.values())
    forwards = rows = 0

    def close(part: str) -> None:
        join_part(job.prepared, folder, job.staging, left[part])
        del open_tasks[part]

    for part in [part for part, number in open_tasks.items() if not number]:
        close(part)
    to_do = [task for own in missing.values() for task in own]
    if not to_do:
        return 0, 0
    for result in run_pool(job, to_do, actors):
        forwards, rows = forwards + result["forwards"], rows + result["rows"]
        open_tasks[result["part"]] -= 1
        if not open_tasks[result["part"]]:
            _check_shared(job.staging, left[result["part"]])
            close(result["part"])
        if progress is not None:
            done = {"rows_done": total - rows_left + rows, "rows_total": total}
            parts = {"parts_done": len(plan.parts) - len(open_tasks), "parts_total": len(plan.parts)}
            progress({"stage": "score", **done, **parts})
    return forwards, rows


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
        "forwards": sum(forwards_of(folder / part) for part in plan.parts),
        "files": files,
        "inputs": plan.inputs,
    }
    write_json(manifest, folder / MANIFEST)
