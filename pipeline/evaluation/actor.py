"""Policy and reference in memory, answering prompts; loads without torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.reference.actor import prepare_device, silence_libraries

if TYPE_CHECKING:
    from pipeline.reference.precision import Precision

__all__ = ["AnswerActor", "AnswerJob"]


@dataclass(frozen=True)
class AnswerJob:
    """All that an actor needs."""

    policy: Any
    reference: Any
    precision: Precision
    use_gpu: bool
    threads: int
    max_new_tokens: int
    temperature: float
    top_p: float
    longest: int
    """Tokens of the longest prompt with both of its answers."""


class AnswerActor:
    """A `pipeline.actors.Runner`: models are loaded with the first task."""

    def __init__(self, job: AnswerJob) -> None:
        self.job = job
        self._answerer: Any = None

    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        """Answer `task["prompts"]` (token ids) as one batch, drawn by `task["seed"]`.

        Returns:
            `place` as given, and `answers`: of each prompt `policy` and `reference` (fields of `strategies.generation.Answer`,
            the reference's None without one), and `logratio` where answers are drawn from the policy itself.

        Raises:
            UserError: when a model can't be loaded.
        """
        from strategies.generation import Sampling

        if self._answerer is None:
            self._answerer = self._load()
        sampling = Sampling(self.job.max_new_tokens, self.job.temperature, self.job.top_p)
        both = self._answerer.answer(task["prompts"], sampling, task["seed"])
        ratios: list[float | None] = [None] * len(both)
        if sampling.is_the_policy and self.job.reference is not None:
            ratios = self._answerer.logratios(task["prompts"], both, self.job.longest)
        answers = [
            {"policy": asdict(own), "reference": asdict(other) if other is not None else None, "logratio": ratio}
            for (own, other), ratio in zip(both, ratios, strict=True)
        ]
        return {"place": task["place"], "answers": answers}

    def _load(self) -> Any:
        import torch

        from strategies.generation import Answerer
        from strategies.tokenizer import load_tokenizer

        job = self.job
        silence_libraries()
        prepare_device(job.use_gpu, job.threads, job.precision)
        autocast = getattr(torch, job.precision.autocast) if job.precision.autocast else None
        try:
            return Answerer(job.policy, job.reference, load_tokenizer(job.policy), "cuda" if job.use_gpu else "cpu", autocast)
        except ValueError as error:
            raise UserError(str(error)) from error
