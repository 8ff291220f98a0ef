"""The reference in memory: rows of token ids in, log-probabilities per token out.

The module loads without torch: what an actor needs it imports when it gets its first task.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.memory import out_of_memory
from pipeline.reference.identity import reference_key
from pipeline.reference.parts import Task, read_rows, write_scores

if TYPE_CHECKING:
    import pyarrow as pa

    from pipeline.reference.precision import Precision

__all__ = ["Job", "ReferenceActor", "prepare_device", "silence_libraries"]

FIRST_BAD = 5


@dataclass(frozen=True)
class Job:
    """All that an actor needs."""

    cfg: Any
    prepared: Path
    staging: Path
    tokens_per_forward: int
    budget_key: str
    """The config key that says `tokens_per_forward`."""
    precision: Precision
    grown: bool
    """Whether the embeddings grow to the tokenizer's size."""
    use_gpu: bool
    threads: int


class ReferenceActor:
    """Holds the reference, which is loaded with the first task: an error of a constructor couldn't come home as a result."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._scorer: Any = None

    def run(self, task: Task) -> dict[str, Any]:
        """Score a task into its staged file; returns how many rows and forwards it was, and why rows weren't packed.

        Raises:
            UserError: when the reference can't be loaded, doesn't fit, or gives numbers that aren't finite.
            OSError: when the file can't be written.
        """
        import torch

        rows = read_rows(self.job.prepared, task)
        if self._scorer is None:
            self._scorer = self._load()
        before = self._scorer.forwards
        try:
            logps = self._scorer.score(rows.to_pylist())
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{self.job.budget_key}: {self.job.tokens_per_forward} tokens and the reference don't fit: "
                f"{out_of_memory(str(error)) or 'the GPU ran out of memory'}; set a smaller number that every row still fits"
            ) from error
        except ValueError as error:
            raise UserError(str(error)) from error
        if bad := [place for place, pair in enumerate(logps) if not _is_finite(pair)]:
            raise UserError(_not_finite(rows, self._bad_alone(rows, bad)))
        forwards = self._scorer.forwards - before
        write_scores(task.staged(self.job.staging), rows, logps, forwards)
        done = {"part": task.part, "start": task.start, "rows": len(rows), "forwards": forwards}
        return {**done, "padded_because": self._scorer.padded_because}

    def _load(self) -> Any:
        import torch
        from safetensors import SafetensorError

        from strategies.packing.scoring import PairScorer
        from strategies.reference import load_reference_alone
        from strategies.tokenizer import load_tokenizer

        job = self.job
        silence_libraries()
        prepare_device(job.use_gpu, job.threads, job.precision)
        try:
            model = load_reference_alone(job.cfg, load_tokenizer(job.cfg) if job.grown else None)
        except ValueError as error:
            raise UserError(str(error)) from error
        except SafetensorError as error:
            key = reference_key(job.cfg)
            raise UserError(f"{key}: no model could be loaded from {getattr(job.cfg, key)!r}: {error}") from error
        if job.use_gpu and not (job.cfg.load_in_4bit or job.cfg.load_in_8bit):  # a quantized model is there already
            model.to("cuda")
        autocast = job.precision.autocast
        dtype = getattr(torch, autocast) if autocast else None
        return PairScorer(model, job.tokens_per_forward, dtype, longest=job.cfg.sequence_len)

    def _bad_alone(self, rows: pa.Table, bad: list[int]) -> list[int]:
        """Which of these rows are bad by themselves: a NaN gets through the mask to the others of its forward."""
        alone = [place for place in bad if not _is_finite(self._scorer.score(rows.slice(place, 1).to_pylist())[0])]
        return alone or bad


def prepare_device(use_gpu: bool, threads: int, precision: Precision) -> None:
    """Set threads and precision of this process, and check that it has what the plan counts on.

    Raises:
        UserError: when it hasn't.
    """
    import torch

    if not use_gpu:
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
    """Keep their warnings off the output of this process."""
    import warnings

    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()


def _is_finite(pair: tuple[Any, Any]) -> bool:
    import numpy as np

    return all(bool(np.isfinite(values).all()) for values in pair)


def _not_finite(rows: pa.Table, bad: list[int]) -> str:
    """The message for rows whose log-probabilities are NaN or infinite; it names the first of them."""
    origins = rows.select(["row_id", "source", "row_number"]).take(bad[:FIRST_BAD]).to_pylist()
    listed = "".join(f"\n  {row['source']} row {row['row_number']} (row_id {row['row_id']})" for row in origins)
    return (
        f"reference: log-probabilities of {len(bad)} of {len(rows)} rows are NaN or infinite, and nothing was written for "
        f"them; check the reference's weights and its precision (bf16, fp16), or take the rows out. The first:{listed}"
    )
