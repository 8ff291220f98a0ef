"""Entry point of stage 2: prepared pairs and a reference in, complete scores out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from cluster.placement import plan_actors
from pipeline.config import RunConfig
from pipeline.config.paths import absolute_paths
from pipeline.data import prepare
from pipeline.data.staged_parts import STAGING
from pipeline.data.store import EVAL, MANIFEST, TRAIN, Prepared, prepared_root
from pipeline.errors import UserError
from pipeline.io.lease import Holder, Lease, held
from pipeline.io.remote_models import fetch_models, find_models
from pipeline.io.storage import Folder
from pipeline.io.threads import ahead
from pipeline.ray.session import init_ray, node_resources
from pipeline.ray.tasks import write_error
from pipeline.reference.actor import Job, run_pool
from pipeline.reference.fingerprint import pin_revision
from pipeline.reference.pictures import check_pictures
from pipeline.reference.plan import FORMAT_VERSION, Plan, make_plan
from pipeline.reference.precision import resolve_precision
from pipeline.reference.reuse import reuse_existing_scores
from pipeline.reference.score_files import Task, find_part, is_reused, join_part, missing_rows, read_prepared, staged_files
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
    `{"stage", "rows_done", "rows_total", "parts_done", "parts_total"}`, and with `"waiting"`, the name of
    another process, in it before a wait.

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
    fetch_models(cfg)
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
    root = prepared_root(cfg.dataset_prepared_path).subfolder("reference")
    # A store that doesn't answer is waited for.
    folder = root.subfolder(plan.fingerprint).carried()
    try:
        # Without the lease: the manifest is written last, so what has one is complete.
        if not recompute and (scores := open_scores(folder, plan)) is not None:
            return scores
        with held(root, f"{plan.fingerprint}.lease", partial(_show_wait, progress, plan)) as lease:
            if recompute:
                # The lease lies beside the folder, so it survives this.
                root.delete(plan.fingerprint)
            # Another process may have completed them while this one waited for it.
            found = open_scores(folder, plan)
            known = None if recompute else root.carried()
            return found or _build(cfg, plan, actors, folder, progress, rows_per_task, known, lease)
    except OSError as error:
        raise UserError(write_error(error, str(folder.where))) from error


def find_scores(cfg: RunConfig, prepared: Prepared) -> Scores | None:
    """Open the cached scores of `cfg`, of a recipe that `check_mode` allows, without Ray; None where there are none.

    Raises:
        UserError: when they were changed since they were written, or the reference can't be found.
    """
    cfg = absolute_paths(cfg)
    root = prepared_root(cfg.dataset_prepared_path).subfolder("reference")
    if not root.names():
        return None
    pictures = check_pictures(cfg, prepared)
    # The precision depends on whether the actors had GPUs, which only a running cluster could say.
    precisions = dict.fromkeys(resolve_precision(cfg, use_gpu) for use_gpu in ((True,) if cfg.fp16 else (True, False)))
    plans = [make_plan(cfg, prepared, precision, pictures=pictures) for precision in precisions]
    folders = [root.subfolder(plan.fingerprint).carried() for plan in plans]
    found = (open_scores(folder, plan) for folder, plan in zip(folders, plans, strict=True))
    return next((scores for scores in found if scores is not None), None)


def _show_wait(progress: Progress | None, plan: Plan, holder: Holder) -> None:
    if progress is not None:
        progress({"stage": "score", "waiting": str(holder), **_done(0, plan, 0)})


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
    cfg: RunConfig,
    plan: Plan,
    actors: ActorPlan,
    folder: Folder,
    progress: Progress | None,
    rows_per_task: int,
    known: Folder | None,
    lease: Lease,
) -> Scores:
    """Compute the missing rows and write complete scores; those of `known`, other scores, are reused."""
    staging = folder.subfolder(STAGING)
    tokens, key = scoring_budget(cfg)
    prepared = plan.prepared
    # Rows are matched by the hash of their ids, so what a killed process staged is used even if tasks are cut otherwise now.
    rows = dict(zip(plan.parts, ahead(partial(read_prepared, prepared), plan.parts), strict=True))
    listed = folder.files()
    found = ((part, find_part(folder, part, rows[part])) for part in plan.parts if part in listed)
    entries = {part: entry for part, entry in found if entry is not None}
    incomplete = {part: part_rows for part, part_rows in rows.items() if part not in entries}
    are_staged = any(name.startswith(f"{STAGING}/") for name in listed)
    staged = {part: _staged_ids(staging, part) if are_staged else {} for part in incomplete}
    if known is not None:
        # Not with `recompute`, which is for scores that aren't trusted.
        unstaged = {part: _unstaged(part_rows, staged[part]) for part, part_rows in incomplete.items()}
        for part in reuse_existing_scores(known, plan.inputs, staging, unstaged):
            staged[part] = _staged_ids(staging, part)
    limits = (rows_per_task, max(TOKENS_PER_TASK, 8 * tokens))
    tasks = {part: _tasks(plan, part, part_rows, staged[part], limits) for part, part_rows in incomplete.items()}
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
        models=find_models(cfg, without=() if cfg.reference_model is None else ("base_model", "lora_model_dir")),
    )

    def join(part: str) -> None:
        lease.check()
        entries[part] = join_part(folder, staging, part, incomplete[part])

    run_stats = _run(job, plan, tasks, join, actors, progress)
    lease.check()
    _finish(plan, folder, entries)
    folder.delete(STAGING)
    scores = open_scores(folder, plan, verify=False)  # each file was hashed when it was written
    assert scores is not None
    return replace(scores, **run_stats)


def _staged_ids(staging: Folder, part: str) -> dict[str, pa.Table]:
    # Not the log-probabilities: those of all parts may not fit into memory.
    return {name: table.select(["ids"]) for name, table in staged_files(staging, part).items()}


def _unstaged(rows: pa.Table, staged: dict[str, pa.Table]) -> pa.Table:
    # Typed, since a run that was killed before it joined a part has left none of its rows missing.
    return rows.take(pa.array(missing_rows(rows, staged.values()), pa.int64()))


def _tasks(plan: Plan, part: str, rows: pa.Table, staged: dict[str, pa.Table], limits: tuple[int, int]) -> list[Task]:
    """Return the tasks of the rows that aren't staged, cut as if only reused ones were: those of a killed run, again."""
    missing = set(missing_rows(rows, staged.values()))
    if not missing:
        return []
    reused = [table for name, table in staged.items() if is_reused(name)]
    tasks = plan.tasks(part, missing_rows(rows, reused), *limits)
    return [left for task in tasks if (left := task.only(missing)) is not None]


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


def _check_shared(staging: Folder, tasks: list[Task]) -> None:
    here = staging.files()
    if missing := next((task.staged for task in tasks if task.staged not in here), None):
        raise UserError(
            f"dataset_prepared_path: another node wrote {missing}, and it is not in {staging.where} here; "
            "give a URI such as s3://bucket/prepared, or a path on storage that all nodes share"
        )


def _finish(plan: Plan, folder: Folder, entries: dict[str, dict[str, Any]]) -> None:
    """Write the manifest, once all parts are complete."""
    fields = ("bytes", "sha256")
    manifest = {
        "fingerprint": plan.fingerprint,
        "format_version": FORMAT_VERSION,
        "prepared": plan.prepared.fingerprint,
        # All forwards run for these parts, those of killed runs too; reused rows add none.
        "forwards": sum(entry["forwards"] for entry in entries.values()),
        "files": [
            {"file": part, "rows": rows, **{name: entries[part][name] for name in fields}} for part, rows in plan.parts.items()
        ],
        "inputs": plan.inputs,
    }
    folder.write_json(MANIFEST, manifest)
