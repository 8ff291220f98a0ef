"""The table of rules about runs: each looks at one thing that goes wrong, and returns a finding with its evidence, or None.

Thresholds without a source are ours: they were set so that runs of the packaged recipes have no finding, and planted faults do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.findings import learning, outcome, rows, steps
from pipeline.findings.facts import RunFacts
from pipeline.ui.findings import Finding

__all__ = ["RULES", "Rule"]


@dataclass(frozen=True)
class Rule:
    """One row of the table."""

    find: Callable[[RunFacts], Finding | None]
    when: str
    """When it finds something, and with which severity, for the docs."""
    source: str = ""
    """Paper or discussion that the rule rests on; empty where there is none."""

    @property
    def name(self) -> str:
        """The name in its findings."""
        return self.find.__name__


RULES: tuple[Rule, ...] = (
    Rule(
        learning.learning_rate_is_zero,
        "error: no recorded learning rate is above 1e-10; warning: it is still rising at the end, below half of learning_rate",
    ),
    Rule(
        learning.loss_stays,
        "the training loss stays within 1 % of its first value and the margin below 0.05 nats; error without a gradient, else "
        "warning",
        "https://github.com/huggingface/trl/issues/4023",
    ),
    Rule(
        learning.loss_above_start,
        "error: the last tenth of the training losses is above 1.25 times the first loss, that of the reference itself; "
        "warning: two or more were above twice of it",
    ),
    Rule(learning.rewards_alike, "error: at least 90 % of all groups of completions have one reward, over the run"),
    Rule(
        outcome.both_fall,
        "both answers have lost likelihood against the reference; info: the chosen one less than half of what the rejected one "
        "has; warning: more than half and a quarter of its log-probability, or its log-probability has doubled; error: more "
        "than half and tripled, or both nearly alike and doubled",
        "https://github.com/eric-mitchell/direct-preference-optimization/issues/8 and /36; arXiv 2404.04626; arXiv 2410.08847",
    ),
    Rule(
        outcome.accuracy_saturates,
        "training accuracy stays above 99 % for the last third or more while the margin grows by half; info where the loss "
        "has no target for the margin, and warning where the evaluation's accuracy is below 95 % and no higher at the end",
        "arXiv 2310.12036",
    ),
    Rule(
        outcome.evaluation_turns,
        "the evaluation's loss ends 5 % or more above its lowest, two evaluations or more ago, while that of training is "
        "lower; warning, and info where the best checkpoint is kept",
    ),
    Rule(
        outcome.answers_grow,
        "warning: generated answers end 1.5 times as long as they begin, or longer",
        "arXiv 2310.03716; arXiv 2403.19159",
    ),
    Rule(
        outcome.kl_beyond_budget,
        "warning: kl ends above 1 / rl_beta nats, where KTO's loss is flat, or for generated completions above 0.5 nats a "
        "token",
        "arXiv 2402.01306; arXiv 2210.10760",
    ),
    Rule(
        steps.gradient_spikes,
        "warning: a gradient norm is above 10 times the median of up to 50 records before it, and above max_grad_norm",
    ),
    Rule(
        steps.steps_skipped,
        "steps were skipped for a loss or gradient that isn't finite; warning, and error from a tenth of all steps on",
    ),
    Rule(
        learning.reference_differs,
        "at the first step policy and reference differ by 5 % or more of the reference's log-probability; warning with a "
        "reference_model, error without, or from 50 % on",
    ),
    Rule(
        rows.labels_flipped,
        "the reference prefers the rejected answer, per token, in 60 % of the pairs or more (95 % interval), by 0.1 nats or "
        "more; warning, and error from 75 % and 0.3 nats on",
        "arXiv 2405.19534: references rank about half of the pairs right",
    ),
    Rule(
        rows.few_prompts,
        "warning: at most a fifth of the first 4,000 training rows have prompts of their own, of 50 rows or more",
    ),
    Rule(
        rows.evaluation_is_small,
        "the 95 % interval of the evaluation's accuracy is wider than 20 points; warning below 30 pairs, else info",
    ),
    Rule(
        steps.padding,
        "more than a fifth of the tokens that are computed is padding, in batches of pairs; info, and warning from a half on",
    ),
    Rule(steps.data_waits, "warning: a step waits for the data loader for more than a fifth of its time"),
)
"""All rules, in the order in which findings of one severity are shown."""
