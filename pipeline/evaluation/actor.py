"""Actor that holds policy and reference and answers prompts; loads without torch."""

from __future__ import annotations

import base64
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.io.remote_models import RemoteModels
from pipeline.reference.actor import prepare_device, silence_libraries
from strategies import inference, models
from strategies.models.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from pipeline.reference.precision import Precision

__all__ = ["AnswerActor", "AnswerJob"]


@dataclass(frozen=True)
class AnswerJob:
    """Arguments of an answering actor."""

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
    pictures: bool = False
    """Whether prompts may have pictures."""
    models: RemoteModels = field(default_factory=RemoteModels)
    """Those at URIs, as the driver has found them."""


class AnswerActor:
    """A `pipeline.ray.actor_pool.Runner` that loads the models with its first task."""

    def __init__(self, job: AnswerJob) -> None:
        self.job = job
        self._answerer: Any = None

    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        """Answer `task["prompts"]` (token ids) as one batch, sampled with `task["seed"]`.

        `task["images"]` are the pictures of each prompt: paths, or bytes in base64.

        Returns:
            `index` of the task, and `answers`: per prompt `policy` and `reference` (fields of `inference.generation.Answer`,
            None without a reference), and `logratio` if answers are sampled from the unmodified policy distribution.

        Raises:
            UserError: when a model can't be loaded.
        """
        # Not in the constructor, whose errors couldn't be returned as a result.
        if self._answerer is None:
            self._answerer = self._load()
        sampling = inference.Sampling(self.job.max_new_tokens, self.job.temperature, self.job.top_p)
        pictures = [{"images": [*map(_received, images)]} for images in task["images"]] if self.job.pictures else []
        pairs = self._answerer.answer(task["prompts"], sampling, task["seed"], pictures)
        # The mean log-ratio estimates KL(policy || reference) only over samples from the policy itself.
        ratios: list[float | None] = [None] * len(pairs)
        if sampling.is_the_policy and self.job.reference is not None:
            ratios = self._answerer.logratios(task["prompts"], pairs, self.job.longest, pictures)
        # Plain JSON values: results reach the driver as text.
        answers = [
            {"policy": asdict(policy), "reference": asdict(reference) if reference is not None else None, "logratio": ratio}
            for (policy, reference), ratio in zip(pairs, ratios, strict=True)
        ]
        return {"index": task["index"], "answers": answers}

    def _load(self) -> Any:
        import torch

        job = self.job
        silence_libraries()
        job.models.bring()
        prepare_device(job.use_gpu, job.threads, job.precision)
        autocast = getattr(torch, job.precision.autocast) if job.precision.autocast else None
        try:
            tokenizer = load_tokenizer(job.policy)
            processor = models.find_processor(job.policy, tokenizer) if job.pictures else None
            vision = inference.VisionProcessing(processor) if processor is not None else None
            device = "cuda" if job.use_gpu else "cpu"
            return inference.Answerer(job.policy, job.reference, tokenizer, device, autocast, vision)
        except ValueError as error:
            raise UserError(str(error)) from error


def _received(image: str | dict[str, str]) -> str | bytes:
    return image if isinstance(image, str) else base64.b64decode(image["base64"])
