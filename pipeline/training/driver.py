"""A run as a whole: prepare, score, start the workers, follow them, collect what they leave."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cluster.preflight import WorkerPlan, plan_workers
from cluster.sharding import is_own, sharding_arguments, sharding_of
from pipeline.config import RunConfig
from pipeline.display import Display
from pipeline.doctor.examination import check_before_run
from pipeline.errors import UserError
from pipeline.notebook import default_display, html_of
from pipeline.paths import absolute_paths
from pipeline.patience import STORAGE_ERRORS
from pipeline.session import connect, node_resources
from pipeline.storage import Location, inside, locate, reason
from pipeline.tracking.run import Membership
from pipeline.tracking.tracking import Tracking, check_trackers
from pipeline.training.checkpoints import repair
from pipeline.training.finished import finished_run
from pipeline.training.folder import REPORT, RunFolder
from pipeline.training.following import RunPlan, follow
from pipeline.training.history import History
from pipeline.training.metrics import MetricsFile
from pipeline.training.stopping import RunControl

if TYPE_CHECKING:
    import pandas

    from pipeline.data import Prepared
    from pipeline.reference import Scores
    from strategies.base import Strategy

__all__ = ["TrainResult", "check_batch", "check_recipe", "load_run", "plan_run", "prepare_data", "score_reference", "train"]


@dataclass(frozen=True)
class TrainResult:
    """What a run has left."""

    run_dir: Location
    """Config, metrics, checkpoints, model: a Path, or the text of a URI."""
    steps: int
    """Optimizer steps of the run."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Last value of every metric."""
    report: Location | None = None
    """The page that shows it; None where none was written."""

    @property
    def model_dir(self) -> Location:
        """The trained model or adapter, with its tokenizer."""
        return inside(self.run_dir, "model")

    @cached_property
    def history(self) -> pandas.DataFrame:
        """One row per logging or evaluation step."""
        return MetricsFile(inside(self.run_dir, "metrics.jsonl")).table()

    def _repr_html_(self) -> str:
        from pipeline.tables import print_result

        return html_of(lambda console: print_result(self, console))


def train(
    cfg: RunConfig,
    *,
    resume: bool = False,
    display: Display | None = None,
    debug: bool = False,
    control: RunControl | None = None,
    report: bool = True,
    member: Membership | None = None,
) -> TrainResult:
    """Prepare the data, score the reference where it is cached, and train on Ray; the run's files go to `output_dir`.

    Args:
        cfg: the recipe.
        resume: continue the run that `output_dir` holds; without it, such a run is refused.
        display: shows stages, steps and notes; when None, progress is shown in a notebook and nothing elsewhere.
        debug: let the output of the workers through.
        control: lets another thread end the run; its complete checkpoints stay.
        report: write the run's page when it ends, well or not.
        member: the sweep that the run is a trial of, for trackers.

    Raises:
        UserError: for anything that the user can mend, before workers start where it can be known then.
        RunFailed: when workers failed more often than `ray.max_failures`.
        RunCancelled: when `control` has asked for it.
    """
    from pipeline.reference import base_fingerprint, settle
    from strategies.cadence import total_steps
    from strategies.registry import get_strategy

    strategy = get_strategy(cfg.rl)
    cfg = absolute_paths(cfg)
    check_recipe(cfg)
    if member is None:  # a trial's trackers were checked with its sweep
        check_trackers(cfg)
    display = display or default_display()
    if cfg.tune is not None:
        cfg = cfg.model_copy(update={"tune": None})
        display.note("tune: is for `prefray tune`; this run has the recipe's own values")
    folder = RunFolder(locate(cfg.output_dir))
    for note in cfg.notes:
        display.note(note)
    display.stage("starting Ray")
    connect(cfg, debug)
    workers = plan_run(cfg, node_resources())
    check_batch(cfg, workers.num_workers)
    tracking = Tracking(cfg, folder, resume, member)
    folder.open(cfg, resume)
    for note in check_before_run(cfg) if control is None else ():  # a trial's cluster was checked with its sweep
        display.note(note)
    for name in repair(folder.storage.filesystem, folder.storage.path):
        display.note(f"{name} is incomplete and was removed")
    if not workers.use_gpu and cfg.bf16 == "auto" and (cfg := settle(cfg)).bf16:
        display.note("bf16: this CPU multiplies bfloat16, so products are computed in it; bf16: false computes in float32")
    prepared = prepare_data(cfg, display)
    for note in strategy.notes(cfg, lambda name: prepared.read("train", [name])[name].to_pylist()):
        display.note(note)
    steps = total_steps(prepared.train_rows, cfg, workers.num_workers)
    selection = _selection(cfg, steps)
    finished = folder.finished_steps()
    if finished is not None and finished >= steps:
        display.note(f"the run has already finished with step {finished}: {folder.path}")
        return _result(folder, finished)
    folder.check(prepared.fingerprint, steps)
    mode = strategy.reference_mode(cfg)
    scores = score_reference(cfg, prepared, display) if mode == "cached" else None
    base = base_fingerprint(cfg) if cfg.adapter is not None or mode == "live" else None
    folder.start(prepared.fingerprint, steps, scores.fingerprint if scores is not None else None, base)
    cfg = cfg.model_copy(update={"reference": mode})
    history, page = History(folder), None
    history.begin(workers, sharding_of(cfg))
    try:
        with tracking.running(display):
            plan = RunPlan(cfg, folder, history, prepared, steps, workers, selection, debug, tracking, scores, control)
            with history:
                returned = follow(plan, display)
            folder.finish(returned["step"], returned["best_metric"])
    finally:
        if report:
            page = _write_page(folder, display)
    return _result(folder, returned["step"], page)


def load_run(run_dir: str) -> TrainResult:
    """The result of a run that has finished, from its folder: a path or a URI.

    Raises:
        UserError: when there is no finished run.
    """
    folder, state = finished_run(run_dir, locate(run_dir))
    return _result(folder, state["step"])


def check_recipe(cfg: RunConfig) -> None:
    """Say now what would otherwise fail in every worker.

    Raises:
        UserError: naming the key.
    """
    from strategies.registry import get_strategy

    _check_models(cfg)
    _check_method(get_strategy(cfg.rl), cfg)
    _check_sharding(cfg)


def plan_run(cfg: RunConfig, nodes: list[dict[str, float]]) -> WorkerPlan:
    """The workers of a run.

    Args:
        nodes: total resources of each node.

    Raises:
        ValueError: when they don't fit.
    """
    least = cfg.min_workers if cfg.is_elastic else None
    return plan_workers(cfg.num_workers, cfg.ray.use_gpu, cfg.worker_resources(), nodes, least)


def prepare_data(cfg: RunConfig, display: Display) -> Prepared:
    """The prepared rows, every one of which fits a forward.

    Raises:
        UserError: as `pipeline.prepare`, and for a pair that doesn't fit.
    """
    from pipeline.data import prepare
    from pipeline.reference import check_training_budget

    display.stage("preparing data")
    prepared = prepare(cfg, progress=display.progress)
    display.note(f"prepared {prepared.train_rows} training and {prepared.eval_rows} evaluation rows: {prepared.path}")
    for note in prepared.notes:
        display.note(note)
    check_training_budget(cfg, prepared)
    return prepared


def check_batch(cfg: RunConfig, num_workers: int) -> None:
    """Refuse batch sizes that don't work with this number of workers.

    Raises:
        UserError: naming the key.
    """
    from strategies.registry import get_strategy

    if problems := [f"{path}: {text}" for path, text in get_strategy(cfg.rl).find_batch_problems(cfg, num_workers)]:
        raise UserError("\n".join(problems))


def _check_models(cfg: RunConfig) -> None:
    from strategies.locations import resolve_model_location

    for key in ("base_model", "reference_model", "lora_model_dir"):
        if getattr(cfg, key) is not None:
            resolve_model_location(getattr(cfg, key), key)


def _check_method(strategy: type[Strategy], cfg: RunConfig) -> None:
    """Say now what the method's own objects, such as reward functions, would say in every worker."""
    try:
        strategy.set_trainer_kwargs(cfg)
    except ValueError as error:
        raise UserError(str(error)) from error


def _check_sharding(cfg: RunConfig) -> None:
    """Say now what DeepSpeed or FSDP2 would say in every worker."""
    if not is_own(cfg):
        return
    from strategies.sharding import find_problems

    if problems := [f"{path}: {message}" for path, message in find_problems(cfg, sharding_arguments(cfg))]:
        raise UserError("\n".join(problems))


def score_reference(cfg: RunConfig, prepared: Prepared, display: Display) -> Scores:
    """The reference's log-probabilities; its actors have ended when this returns, so that workers have the machine."""
    from pipeline.reference import score

    display.stage("scoring the reference")
    scores = score(cfg, prepared, progress=display.progress)
    rows = scores.train_rows + scores.eval_rows
    how = f"{scores.forwards} forwards" if scores.forwards else "they were there already"
    display.note(f"reference log-probabilities of {rows} rows: {scores.path} ({how})")
    if scores.padded_because:
        display.note(f"the reference scored one completion at a time: {scores.padded_because}")
    return scores


def _selection(cfg: RunConfig, steps: int) -> dict[str, Any]:
    """What Ray needs to know to keep the best checkpoint; a cadence that contradicts itself is said here."""
    from strategies.cadence import RunLength, cadence_arguments

    arguments = cadence_arguments(cfg, RunLength(steps, steps, steps_per_epoch=None))
    if not arguments.get("load_best_model_at_end"):
        return {}
    return {
        "checkpoint_score_attribute": arguments["metric_for_best_model"],
        "checkpoint_score_order": "max" if arguments["greater_is_better"] else "min",
    }


def _write_page(folder: RunFolder, display: Display) -> Location | None:
    """Write the run's page; a run doesn't fail for it."""
    from pipeline.report.run import run_page

    display.stage("writing the report")
    page = inside(folder.path, REPORT)
    try:
        folder.storage.write(REPORT, run_page(folder))
    except (UserError, *STORAGE_ERRORS) as error:
        display.note(f"{page} is not written: {reason(error)}; `prefray report {folder.path}` writes it")
        return None
    return page


def _result(folder: RunFolder, step: int, page: Location | None = None) -> TrainResult:
    metrics: dict[str, float] = {}
    for record in MetricsFile(folder.metrics).read():
        metrics.update({name: value for name, value in record.items() if name not in ("step", "time")})
    return TrainResult(folder.path, step, metrics, page)
