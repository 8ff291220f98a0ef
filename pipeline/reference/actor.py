"""The reference in memory: rows of token ids in, log-probabilities per token out.

The module loads without torch: an actor imports it with its first task.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.config import RunConfig
from pipeline.data.pictures import IMAGES, picture_column
from pipeline.errors import UserError
from pipeline.io.remote_models import RemoteModels
from pipeline.io.storage import Folder
from pipeline.ray.actor_pool import StageInfo, run_on_actors
from pipeline.ray.memory import out_of_memory
from pipeline.reference.fingerprint import reference_key
from pipeline.reference.score_files import Task, read_rows, rows_of, write_scores
from strategies import inference, models
from strategies.models.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import pyarrow as pa

    from cluster.placement import ActorPlan
    from pipeline.data import Prepared
    from pipeline.reference.precision import Precision

__all__ = ["Job", "ReferenceActor", "prepare_device", "run_pool", "silence_libraries"]

REMAINS = "what was complete stays: run again to continue"


def run_pool(job: Job, tasks: Sequence[Task], actors: ActorPlan) -> Iterator[dict[str, Any]]:
    """Yield the results of `ReferenceActor.run` for every task, as they complete; the actors end with the iterator.

    Ray must be running.

    Raises:
        UserError, RunFailed: as `run_on_actors`.
    """
    work = StageInfo("scoring", f"lower {job.budget_key}, or ray.score.num_actors", REMAINS)
    keyed = {f"{task.part}:{task.start}": asdict(task) for task in tasks}
    yield from run_on_actors(_Scoring, job, keyed, actors, work)


FIRST_BAD = 5


@dataclass(frozen=True)
class Job:
    """Arguments of a scoring actor."""

    cfg: RunConfig
    prepared: Prepared
    staging: Folder
    tokens_per_forward: int
    budget_key: str
    """The config key that sets `tokens_per_forward`, for messages."""
    precision: Precision
    grown: bool
    """Whether the embeddings are resized to the tokenizer."""
    use_gpu: bool
    threads: int
    pictures: bool = False
    """Whether rows have pictures."""
    models: RemoteModels = field(default_factory=RemoteModels)
    """Those at URIs, as the driver has found them."""


class ReferenceActor:
    """Holds the reference. It is loaded with the first task, since errors of a constructor couldn't be returned as a result."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._scorer: Any = None
        self._part: tuple[str, pa.Table] | None = None

    def run(self, task: Task) -> dict[str, Any]:
        """Score a task into its staged file; return the numbers of rows and forwards, and why rows weren't packed.

        Raises:
            UserError: when the reference can't be loaded, doesn't fit, or returns NaN or infinite log-probabilities.
            OSError: when the file can't be written.
        """
        import torch

        rows = rows_of(task, self._read(task.part))
        if self._scorer is None:
            self._scorer = self._load()
        before = self._scorer.forwards
        try:
            logps = self._score(rows)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{self.job.budget_key}: {self.job.tokens_per_forward} tokens and the reference don't fit: "
                f"{out_of_memory(str(error)) or 'the GPU ran out of memory'}; set a smaller number that every row still fits"
            ) from error
        except ValueError as error:
            raise UserError(str(error)) from error
        # Before anything is written: a staged file counts as done.
        if bad := [index for index, pair in enumerate(logps) if not _is_finite(pair)]:
            raise UserError(_not_finite(rows, self._bad_alone(rows, bad)))
        hidden = [(states.chosen, states.rejected) for states in self._scorer.hidden]
        if not all(map(_is_finite, hidden)):
            raise UserError("ray.score.hidden_states: this reference's hidden states are beyond float16; remove the key")
        # The scorer counts over all tasks of its actor.
        forwards = self._scorer.forwards - before
        write_scores(self.job.staging, task.staged, rows, logps, forwards, hidden)
        done = {"part": task.part, "start": task.start, "rows": len(rows), "forwards": forwards}
        return {**done, "padded_because": self._scorer.padded_because}

    def _read(self, part: str) -> pa.Table:
        # Kept for the tasks that follow: most are of the same part.
        if self._part is None or self._part[0] != part:
            self._part = part, read_rows(self.job.prepared, part)
        return self._part[1]

    def _score(self, rows: pa.Table) -> Any:
        if IMAGES in rows.column_names:
            column = picture_column(self.job.prepared.folder, rows[IMAGES])
            rows = rows.set_column(rows.column_names.index(IMAGES), IMAGES, column)
        return self._scorer.score(rows.to_pylist())

    def _load(self) -> Any:
        import torch
        from safetensors import SafetensorError

        job = self.job
        silence_libraries()
        job.models.bring()
        # Before the weights: a GPU that can't be used is reported without loading them.
        prepare_device(job.use_gpu, job.threads, job.precision)
        try:
            # The tokenizer is needed only to resize the embeddings.
            model = inference.load_reference_alone(job.cfg, load_tokenizer(job.cfg) if job.grown else None)
            processor = models.find_processor(job.cfg, load_tokenizer(job.cfg)) if job.pictures else None
        except ValueError as error:
            raise UserError(str(error)) from error
        # It derives from Exception alone, so neither ValueError nor OSError covers a broken file.
        except SafetensorError as error:
            key = reference_key(job.cfg)
            raise UserError(f"{key}: no model could be loaded from {getattr(job.cfg, key)!r}: {error}") from error
        if job.use_gpu and not (job.cfg.load_in_4bit or job.cfg.load_in_8bit):  # a quantized model is loaded onto the GPU
            model.to("cuda")
        autocast = job.precision.autocast
        dtype = getattr(torch, autocast) if autocast else None
        vision = inference.VisionProcessing(processor) if processor is not None else None
        hidden = job.cfg.ray.score.hidden_states
        return inference.PairScorer(model, job.tokens_per_forward, dtype, job.cfg.sequence_len, vision, hidden)

    def _bad_alone(self, rows: pa.Table, bad: list[int]) -> list[int]:
        """Return the rows that are bad when scored alone: a NaN passes the mask into the other rows of its forward."""
        # Else the first message would name rows that are sound.
        alone = [index for index in bad if not _is_finite(self._score(rows.slice(index, 1))[0])]
        return alone or bad


class _Scoring(ReferenceActor):
    """A `ReferenceActor` whose tasks are parsed JSON."""

    def run(self, task: Any) -> dict[str, Any]:
        # JSON has made the tuple a list.
        return super().run(Task(**{**task, "rows": tuple(task["rows"])}))


def prepare_device(use_gpu: bool, threads: int, precision: Precision) -> None:
    """Set threads and precision of this process, and check its GPU.

    Raises:
        UserError: when the GPU that the plan expects is unusable, or has no bfloat16.
    """
    import torch

    if not use_gpu:
        # By the plan, not by OMP_NUM_THREADS, which the environment may set for all processes.
        torch.set_num_threads(threads)
        return
    if not torch.cuda.is_available():
        raise UserError(
            "ray.use_gpu: Ray gave a scoring actor a GPU that torch can't use; install torch with CUDA, or set false"
        )
    if precision.autocast == "bfloat16" and not torch.cuda.is_bf16_supported():
        raise UserError("bf16: a scoring actor's GPU has no bfloat16; use fp16: true, or bf16: false")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision.tf32


def silence_libraries() -> None:
    """Silence Python warnings and transformers' log in this process."""
    import warnings

    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()


def _is_finite(pair: tuple[Any, Any]) -> bool:
    import numpy as np

    return all(bool(np.isfinite(values).all()) for values in pair)


def _not_finite(rows: pa.Table, bad: list[int]) -> str:
    """Return the message for rows with NaN or infinite log-probabilities, which names the first ones."""
    origins = rows.select(["row_id", "source", "row_number"]).take(bad[:FIRST_BAD]).to_pylist()
    listed = "".join(f"\n  {row['source']} row {row['row_number']} (row_id {row['row_id']})" for row in origins)
    return (
        f"reference: log-probabilities of {len(bad)} of {len(rows)} rows are NaN or infinite, and nothing was written for "
        f"them; check the reference's weights and its precision (bf16, fp16), or take the rows out. The first:{listed}"
    )
