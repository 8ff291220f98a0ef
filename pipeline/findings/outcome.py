"""What a run has learned: rules of `rules.py`, which says when they find something."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.findings.facts import RunFacts
from pipeline.findings.learning import reference_differs
from pipeline.ui.findings import Evidence, Finding, Severity

__all__ = ["accuracy_saturates", "answers_grow", "both_fall", "evaluation_turns", "kl_beyond_budget"]

FALLS: dict[Severity, tuple[str, str]] = {
    "info": (
        "Chosen and rejected answers both become less likely, the chosen ones much less so: usual, not a fault.",
        "nothing; to keep chosen answers likely: {keep}a higher rl_beta",
    ),
    "warning": (
        "Chosen answers lose likelihood, more than is usual where the rejected ones do.",
        "{keep}a higher rl_beta, a lower learning_rate, or fewer epochs; look for pairs that are nearly alike",
    ),
    "error": (
        "Chosen answers have become very unlikely, as rejected ones have: the model forgets how to write either.",
        "lower learning_rate tenfold; then {keep}a higher rl_beta",
    ),
}


def both_fall(run: RunFacts) -> Finding | None:
    # Rewards that aren't 0 before the first step are no loss of likelihood.
    if reference_differs(run) is not None:
        return None
    chosen, rejected = (_fall(run, side) for side in ("chosen", "rejected"))
    if chosen is None or rejected is None or min(chosen.nats, rejected.nats) < 1 or chosen.part < 0.01:
        return None
    share = chosen.nats / rejected.nats
    severity: Severity = "info"
    if (share >= 0.5 and chosen.part >= 0.25) or chosen.part >= 1:
        is_lost = (share >= 0.8 and chosen.part >= 1) or (share >= 0.5 and chosen.part >= 2)
        severity = "error" if is_lost else "warning"
    sentence, advice = FALLS[severity]
    evidence = (
        Evidence("chosen, change in nats", -chosen.nats, chosen.step),
        Evidence("rejected, change in nats", -rejected.nats, rejected.step),
        Evidence("chosen, change in % of its log-probability", round(-100 * chosen.part, 1)),
    )
    keep = "rpo_alpha: 1, or " if "rpo_alpha" in run.strategy.keys else ""
    return Finding("both_fall", severity, sentence, evidence, advice.format(keep=keep))


@dataclass(frozen=True)
class Fall:
    """How much less likely answers have become: in nats, and as a fraction of their log-probability before."""

    nats: float
    part: float
    step: int


def _fall(run: RunFacts, side: str) -> Fall | None:
    logps, rewards = (run.curves.evaluated_or_trained(f"{kind}/{side}") for kind in ("logps", "rewards"))
    if not len(logps) or not len(rewards):
        return None
    if run.compares:
        nats = -rewards.end / run.beta
        before = logps.end + nats
    elif run.strategy.batch_kind == "pair" and logps.name.startswith("eval_"):
        # Without a reference two evaluations are compared; batches of training have other rows each.
        nats, before = logps.first - logps.last, logps.first
    else:
        return None
    return Fall(nats, nats / -before, int(logps.steps[-1])) if before < 0 else None


def accuracy_saturates(run: RunFacts) -> Finding | None:
    accuracy, margins = run.curves["rewards/accuracies"], run.curves["rewards/margins"]
    below = np.flatnonzero(accuracy.values < 0.99)
    start = int(below[-1]) + 1 if len(below) else 0
    rest = len(accuracy) - start
    if rest < 10 or rest < len(accuracy) / 3:
        return None
    grown = margins.between(int(accuracy.steps[start]), run.curves.last_step)
    if len(grown) < 2 or grown.start <= 0 or grown.end < 1.5 * grown.start:
        return None
    evaluated = run.curves["eval_rewards/accuracies"].between(int(accuracy.steps[start]), run.curves.last_step)
    evidence: tuple[Evidence, ...] = (accuracy.at(start), *grown.ends())
    # Of 19 pairs in 20 ranked right there is little to gain.
    is_worse = len(evaluated) > 1 and evaluated.last <= evaluated.first < 0.95
    if run.has_target and not is_worse:
        return None
    if is_worse:
        evidence += (evaluated.at(0), evaluated.at(-1))
    sentence = "Every training pair is ranked right, and the margin alone still grows"
    sentence += ", which the evaluation doesn't gain from." if is_worse else "."
    advice = "fewer epochs, or early_stopping_patience"
    if "dpo_label_smoothing" in run.strategy.keys and not run.has_target:
        advice += "; or dpo_label_smoothing: 0.1, or rl: ipo, whose margins have a bound"
    return Finding("accuracy_saturates", "warning" if is_worse else "info", sentence, evidence, advice)


def evaluation_turns(run: RunFacts) -> Finding | None:
    evaluated, loss = run.curves["eval_loss"], run.curves["loss"]
    if len(evaluated) < 4 or len(loss) < 4:
        return None
    best = int(evaluated.values.argmin())
    trained = loss.between(int(evaluated.steps[best]), run.curves.last_step)
    rises = evaluated.last > evaluated.values[best] + 0.05 * abs(evaluated.values[best])
    if best >= len(evaluated) - 2 or not rises or len(trained) < 2 or trained.end >= trained.start:
        return None
    kept = run.cfg.load_best_model_at_end or run.cfg.early_stopping_patience
    sentence = f"The evaluation is best at step {evaluated.steps[best]:,} and gets worse from there, while training goes on."
    advice = "load_best_model_at_end: true with early_stopping_patience: 2, or fewer epochs, or a lower learning_rate"
    advice = "nothing: the best checkpoint is kept" if kept else advice
    evidence = (evaluated.at(best), evaluated.at(-1), *trained.ends())
    return Finding("evaluation_turns", "info" if kept else "warning", sentence, evidence, advice)


def answers_grow(run: RunFacts) -> Finding | None:
    for name in ("eval_answer_length", "completions/mean_length"):
        lengths = run.curves[name]
        if len(lengths) > 1 and lengths.start > 0 and lengths.end >= 1.5 * lengths.start:
            evidence: tuple[Evidence, ...] = lengths.ends()
            if len(clipped := run.curves["completions/clipped_ratio"]):
                evidence += (clipped.ends()[1],)
            advice = (
                "compare the lengths of chosen and rejected answers; rl: simpo, dpo_ld_alpha, or a reward that counts length"
            )
            return Finding("answers_grow", "warning", "Generated answers grow longer.", evidence, advice)
    return None


MOST_KL_PER_TOKEN = 0.5


def kl_beyond_budget(run: RunFacts) -> Finding | None:
    kl, kind = run.curves["kl"], run.strategy.batch_kind
    # Of pairs it is no divergence: neither answer was sampled from the policy.
    if len(kl) < 2 or kind == "pair":
        return None
    budget = 1 / run.beta if kind == "unpaired" else MOST_KL_PER_TOKEN
    if kl.end <= budget:
        return None
    sentence = "The policy is further from its reference than its budget."
    key = "rl_beta" if kind == "unpaired" else "trl.beta"
    evidence = (*kl.ends(), Evidence("budget in nats", budget))
    return Finding("kl_beyond_budget", "warning", sentence, evidence, f"raise {key}, or lower learning_rate")
