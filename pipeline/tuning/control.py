"""What the driver of a sweep does on request: it ends trials, and adds clones of trials with changed values."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from ray.tune.experiment import Trial

from cluster.ray_compat import add_trial
from pipeline.config import RunConfig
from pipeline.config.tuning import SWEEP_KEYS, Dimension, perturbable
from pipeline.data.sources.locate import locate
from pipeline.errors import UserError
from pipeline.io.retry import STORAGE_ERRORS
from pipeline.planning import check_recipe
from pipeline.runs.folder import RunFolder
from pipeline.training.sharing import why_not_shared
from pipeline.tuning.folder import SweepFolder
from pipeline.tuning.objective import SweepObjective, resolve_objective
from pipeline.tuning.records import TrialRecord
from pipeline.tuning.requests import CloneTrial, Request, StopTrial, answer, taken
from pipeline.tuning.search import CLONE, SAMPLE, trial_number
from pipeline.tuning.space import Values, shown_values, trial_recipe

__all__ = ["TrialControl", "check_clone", "check_stop"]

LOOK_EVERY_S, LOOK_AT_URI_EVERY_S = 0.5, 5.0
ENDED = {"finished": "has finished", "stopped": "has ended", "failed": "has failed"}
FIXED = (*SWEEP_KEYS, "plugins")
"""Keys that a clone can't change, nor any below `ray` and `tune`."""


class TrialControl:
    """Carries out requests in the loop of Tune's controller.

    Args:
        cfg: the sweep's recipe.
        recipes: of trials, which together say what all trials report.
        folder: the sweep's.
        first_clone: number of the first clone, beyond those of the search; None where none is taken any more.
    """

    def __init__(
        self, cfg: RunConfig, recipes: list[RunConfig], measure: SweepObjective, folder: SweepFolder, first_clone: int | None
    ) -> None:
        self._cfg, self._recipes, self._measure, self._folder = cfg, recipes, measure, folder
        self._first_clone, self._looked = first_clone, 0.0
        self._controller: Any = None

    def attach(self, controller: Any) -> None:
        """Take Tune's controller."""
        self._controller = controller

    def serve(self, records: Mapping[int, TrialRecord], note: Callable[[str], None]) -> None:
        """Carry out the requests that have come, and answer them.

        Args:
            records: of all trials by their numbers, up to date.
            note: shows what was done.
        """
        every = LOOK_EVERY_S if self._folder.storage.is_local else LOOK_AT_URI_EVERY_S
        if time.monotonic() - self._looked < every:
            return
        self._looked = time.monotonic()
        try:
            for name, request in taken(self._folder):
                self._answer(name, request, records, note)
        except STORAGE_ERRORS:
            return  # a sweep doesn't fail for it; who has asked waits, or asks again

    def _answer(self, name: str, request: Request, records: Mapping[int, TrialRecord], note: Callable[[str], None]) -> None:
        try:
            text = self._carry_out(request, records)
        except ValueError as error:  # also of `strategies` and `cluster`, which have no UserError
            answer(self._folder, name, str(error), refused=True)
            return
        note(f"on request: {text}")
        answer(self._folder, name, text, refused=False)

    def _carry_out(self, request: Request, records: Mapping[int, TrialRecord]) -> str:
        if isinstance(request, StopTrial):
            more = not self._controller.search_alg.is_finished()
            check_stop(request, records, more)
            record = records[request.trial]
            self._controller.stop_trial(self._trial(request.trial))
            return f"trial {record.name} ends at step {record.step}" + (f"/{record.total_steps}" if record.total_steps else "")
        return self._clone(request, records)

    def _clone(self, request: CloneTrial, records: Mapping[int, TrialRecord]) -> str:
        if self._first_clone is None:
            raise UserError("the search has ended, and its finalists are repeated: no trial can be cloned any more")
        values = check_clone(request, records, self._cfg, self._recipes, self._measure)
        number = max(self._first_clone, max(records) + 1)
        sample: dict[str, Any] = {"number": number, "values": values, "clone_of": request.trial}
        start = ", from the beginning"
        if request.warm_start:
            sample["start"] = self._checkpoint(records[request.trial])
            start = f", from the checkpoint of step {sample['start']['step']}"
        add_trial(self._controller, self._trial(request.trial), f"{CLONE}{number:05d}", {SAMPLE: sample})
        return f"trial {number} is a clone of trial {request.trial} with {shown_values(request.changes)}{start}"

    def _checkpoint(self, record: TrialRecord) -> dict[str, Any]:
        """Return the pointer to a trial's newest checkpoint."""
        steps = [] if record.folder is None else RunFolder(self._folder.trial(record.folder)).checkpoints()
        if not steps:
            raise UserError(
                f"trial {record.name} has no complete checkpoint yet to go on from; wait for one (save_steps), "
                "or clone it from the beginning"
            )
        if steps[-1] >= record.total_steps:
            raise UserError(f"the last checkpoint of trial {record.name} is its end: nothing is left to train from there")
        return {"folder": record.folder, "step": steps[-1], "number": record.number}

    def _trial(self, number: int) -> Trial:
        trials: list[Trial] = self._controller.get_trials()
        return next(trial for trial in trials if trial_number(trial.trial_id, trial.config) == number)


def check_stop(request: StopTrial, records: Mapping[int, TrialRecord], more: bool) -> None:
    """Check that a trial can be ended.

    Args:
        request, records: as in `TrialControl`.
        more: whether the search will begin further trials.

    Raises:
        UserError: when there is no such trial, it has ended, or it is the last one.
    """
    record = _known(request.trial, records)
    if record.status in ENDED:
        raise UserError(f"trial {record.name} {ENDED[record.status]} already")
    others = [one for one in records.values() if one is not record and one.status not in ENDED]
    if not others and not more:
        raise UserError(
            f"trial {record.name} is the last one that runs: without it the sweep would end; wait for its end, clone a trial "
            "first, or stop the whole sweep by Ctrl-C or SIGTERM, after which --resume continues it"
        )


def check_clone(
    request: CloneTrial,
    records: Mapping[int, TrialRecord],
    cfg: RunConfig,
    recipes: list[RunConfig],
    measure: SweepObjective,
) -> Values:
    """Return the values of a clone.

    Args:
        request, records, cfg, recipes, measure: as in `TrialControl`.

    Raises:
        ValueError: when there is no such trial, or the changes don't make another trial of this sweep.
    """
    record = _known(request.trial, records)
    if not request.changes:
        raise UserError("a clone needs a changed value: --set learning_rate=2e-6")
    for key in request.changes:
        if key in FIXED or key.partition(".")[0] in ("ray", "tune"):
            raise UserError(f"{key}: belongs to the sweep as a whole, and a clone can't change it")
        if request.warm_start and key not in perturbable():
            raise UserError(f"{key}: can't change while a run goes on from a checkpoint; clone without --warm-start")
    values = {**(record.values or {}), **request.changes}
    clone, origin = (trial_recipe(cfg, one, cfg.output_dir) for one in (values, record.values))
    if clone == origin:
        raise UserError(f"trial {record.name} has these values already: {shown_values(request.changes)}")
    check_recipe(clone)
    for name in {"datasets", "test_datasets"} & {key.partition(".")[0] for key in request.changes}:
        _check_sources(name, clone)
    assert cfg.tune is not None
    if cfg.tune.share_base is True and (reasons := why_not_shared(clone, origin)):
        raise UserError("; ".join(f"tune.share_base: true, but {key}: {why}" for key, why in reasons))
    _check_comparable(request, cfg, [*recipes, clone], measure)
    return values


def _check_sources(name: str, cfg: RunConfig) -> None:
    """Refuse datasets that aren't there, which the clone's run would find out."""
    for number, dataset in enumerate(getattr(cfg, name) or []):
        try:
            locate(dataset.model_dump(exclude_none=True))
        except UserError as error:
            raise UserError(f"{name}.{number}.{error}") from error
        except STORAGE_ERRORS as error:
            raise UserError(f"{name}.{number}.path: can't be read: {error}") from error


def _check_comparable(request: CloneTrial, cfg: RunConfig, recipes: list[RunConfig], measure: SweepObjective) -> None:
    """Refuse a clone whose metrics can't be compared with those of the other trials."""
    assert cfg.tune is not None
    changed = {key: [Dimension(choice=[value])] for key, value in request.changes.items()}
    metrics = [objective.metric for objective in measure.objectives]
    modes = [objective.mode for objective in measure.objectives]
    resolve_objective(
        cfg.tune.model_copy(update={"space": {**cfg.tune.space, **changed}, "metric": metrics, "mode": modes}), recipes
    )


def _known(number: int, records: Mapping[int, TrialRecord]) -> TrialRecord:
    if number not in records:
        listed = ", ".join(map(str, sorted(records))) or "none yet"
        raise UserError(f"there is no trial {number}; the sweep's trials are: {listed}")
    return records[number]
