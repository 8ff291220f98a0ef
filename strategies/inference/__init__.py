"""Inference: forward passes and generation without training.

reference.py         the reference policy
scoring.py           log-probabilities of pairs
generation.py        answers to prompts
eval_generations.py  answers at a trainer's evaluations
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from strategies.lazy import lazy_names

if TYPE_CHECKING:
    from strategies.inference.generation import Answer, Answerer, Sampling, generate
    from strategies.inference.reference import as_reference, load_reference_alone
    from strategies.inference.scoring import PairScorer
    from strategies.vision.processing import VisionProcessing
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "strategies.inference.generation": "Answer Answerer Sampling generate",
            "strategies.inference.reference": "as_reference load_reference_alone",
            "strategies.inference.scoring": "PairScorer",
            "strategies.vision.processing": "VisionProcessing",
        },
    )

__all__ = [
    "Answer",
    "Answerer",
    "PairScorer",
    "Sampling",
    "VisionProcessing",
    "as_reference",
    "generate",
    "load_reference_alone",
]
