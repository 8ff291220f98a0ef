"""The table of rules: each looks at one thing that goes wrong in runs, and returns a finding with its evidence, or None.

Thresholds without a source are ours: they were set so that runs of the packaged recipes have no finding, and planted faults do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pipeline.findings.facts import RunFacts
from pipeline.ui.findings import Evidence, Finding, Severity

__all__ = ["RULES", "Rule", "interval"]

Find = Callable[[RunFacts], Finding | None]


@dataclass(frozen=True)
class Rule:
    """One row of the table."""

    name: str
    find: Find
    when: str
    """When it finds something, and with which severity, for the docs."""
    source: str
    """Paper or discussion that the rule rests on; empty where there is none."""


RULES: list[Rule] = []
"""All rules, in the order in which findings of one severity are shown."""


def rule(when: str, source: str = "") -> Callable[[Find], Find]:
    """Return a decorator that adds a function to `RULES` under its own name."""

    def add(find: Find) -> Find:
        RULES.append(Rule(find.__name__, find, when, source))
        return find

    return add


# Does the run learn at all


NO_RATE = 1e-10
"""A learning rate below this changes no weight in float32 or bfloat16 within any run."""


@rule("error: no recorded learning rate is above 1e-10; warning: it is still rising at the end, below half of learning_rate")
def learning_rate_is_zero(run: RunFacts) -> Finding | None:
    rates = run.curves["learning_rate"]
    if not len(rates):
        return None
    top, asked = int(rates.values.argmax()), run.cfg.learning_rate
    evidence = (rates.at(top), Evidence("learning_rate of the recipe", asked))
    name = "learning_rate_is_zero"
    if rates.values[top] < NO_RATE:
        advice = "set learning_rate (5e-7 to 5e-6 for all weights, 1e-5 to 2e-4 for an adapter), or fewer warmup_steps"
        return Finding(name, "error", "The learning rate is 0 in effect, so the model hasn't changed.", evidence, advice)
    if run.is_finished and len(rates) > 2 and top == len(rates) - 1 and rates.values[top] < asked / 2:
        advice = "lower warmup_steps or warmup_ratio, or train longer"
        return Finding(name, "warning", "The run ended while its learning rate was still warming up.", evidence, advice)
    return None


FLAT = 0.01
"""Largest change of a flat loss, as a fraction of its first value."""
STILL = 0.05
"""Largest margin of a policy that hasn't moved from its reference, in nats."""
LN2 = math.log(2)


@rule(
    "the training loss stays within 1 % of its first value and the margin below 0.05 nats; error without a gradient, else "
    "warning",
    "https://github.com/huggingface/trl/issues/4023",
)
def loss_stays(run: RunFacts) -> Finding | None:
    loss, margins, norms = run.curves["loss"], run.curves["rewards/margins"], run.curves["grad_norm"]
    if not run.compares or len(loss) < 4 or learning_rate_is_zero(run) is not None:
        return None
    moved = np.abs(loss.values - loss.first).max() > FLAT * abs(loss.first)
    if moved or not len(margins) or np.abs(margins.values).max() / run.beta > STILL:
        return None
    name = "loss_stays"
    where = "ln 2, where it starts" if abs(loss.first - LN2) < FLAT else f"{loss.first:.4g}, where it starts"
    evidence: tuple[Evidence, ...] = (loss.at(0), loss.at(-1), margins.at(-1))
    if len(norms) and norms.values.max() == 0:
        attached = ", or the adapter isn't attached to the layers that run" if run.cfg.adapter is not None else ""
        sentence = f"The loss stays at {where}, since no gradient reaches a trained weight{attached}."
        advice = "see which weights are trained: lora_target_modules, lora_model_dir, peft_init_lora_weights, lr_groups"
        return Finding(name, "error", sentence, (*evidence, norms.at(-1)), advice)
    rates = run.curves["learning_rate"]
    evidence += tuple(curve.at(int(curve.values.argmax())) for curve in (rates, norms) if len(curve))
    sentence = f"The loss stays at {where}: there is a gradient, and the steps are too small or too few to follow it."
    advice = "raise learning_rate tenfold, or train longer; if that changes nothing, the answers of a pair may not differ"
    return Finding(name, "warning", sentence, evidence, advice)


@rule(
    "error: the last tenth of the training losses is above 1.25 times the first loss, that of the reference itself; warning: "
    "two or more were above twice of it"
)
def loss_above_start(run: RunFacts) -> Finding | None:
    loss = run.curves["loss"]
    if not run.compares or len(loss) < 4:
        return None
    name, advice = "loss_above_start", "lower learning_rate tenfold, or warm up longer"
    if loss.end > 1.25 * abs(loss.first):
        sentence = "The run diverges: its loss ends above that of a model that hasn't been trained."
        return Finding(name, "error", sentence, (loss.at(0), loss.ends()[1]), advice)
    if np.sort(loss.values)[-2] > 2 * abs(loss.first):
        sentence = "The loss went far above that of a model that hasn't been trained, before it fell."
        return Finding(name, "warning", sentence, (loss.at(0), loss.at(int(loss.values.argmax())), loss.at(-1)), advice)
    return None


@rule("error: at least 90 % of all groups of completions have one reward, over the run")
def rewards_alike(run: RunFacts) -> Finding | None:
    alike = run.curves["frac_reward_zero_std"]
    if len(alike) < 2 or (mean := float(alike.values.mean())) < 0.9:
        return None
    sentence = "Nearly all groups of completions get one and the same reward, so there is nothing to learn from."
    advice = "take prompts that the model solves sometimes, raise trl.num_generations or trl.temperature, or grade finer"
    evidence = (Evidence("frac_reward_zero_std (mean)", mean), alike.at(-1))
    return Finding("rewards_alike", "error", sentence, evidence, advice)


# Does it learn what it should


FALLS: dict[Severity, tuple[str, str]] = {
    "info": (
        "Chosen and rejected answers both become less likely, the chosen ones much less so: usual, not a fault.",
        "nothing; to keep chosen answers likely: rpo_alpha: 1, or a higher rl_beta",
    ),
    "warning": (
        "Chosen answers lose likelihood, more than is usual where the rejected ones do.",
        "rpo_alpha: 1, a higher rl_beta, a lower learning_rate, or fewer epochs; look for pairs that are nearly alike",
    ),
    "error": (
        "Chosen answers have become as unlikely as rejected ones: the model forgets both instead of ranking them.",
        "lower learning_rate tenfold; then rpo_alpha: 1, or a higher rl_beta",
    ),
}


@rule(
    "both answers have lost likelihood against the reference; info: the chosen one less than half of what the rejected one "
    "has; warning: more than half and a quarter of its log-probability, or its log-probability has doubled; error: more "
    "than half and tripled, or both nearly alike and doubled",
    "https://github.com/eric-mitchell/direct-preference-optimization/issues/8 and /36; arXiv 2404.04626; arXiv 2410.08847",
)
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
    return Finding("both_fall", severity, sentence, evidence, advice)


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


@rule(
    "training accuracy stays above 99 % for the last third or more, and the margin grows by half since; info, and warning "
    "where the evaluation's accuracy is no higher at the end",
    "arXiv 2310.12036",
)
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
    is_worse = len(evaluated) > 1 and evaluated.last <= evaluated.first < 1
    if is_worse:
        evidence += (evaluated.at(0), evaluated.at(-1))
    sentence = "Every training pair is ranked right, and the margin alone still grows"
    sentence += ", which the evaluation doesn't gain from." if is_worse else "."
    advice = "fewer epochs, early_stopping_patience, or dpo_label_smoothing: 0.1 or rl: ipo, whose margins have a bound"
    return Finding("accuracy_saturates", "warning" if is_worse else "info", sentence, evidence, advice)


@rule(
    "the evaluation's loss ends 5 % or more above its lowest, two evaluations or more ago, while that of training is lower; "
    "warning, and info where the best checkpoint is kept"
)
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


@rule("warning: generated answers end 1.5 times as long as they begin, or longer", "arXiv 2310.03716; arXiv 2403.19159")
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


@rule(
    "warning: kl ends above 1 / rl_beta nats, where KTO's loss is flat, or for generated completions above 0.5 nats a token",
    "arXiv 2402.01306; arXiv 2210.10760",
)
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


# Single steps


BEFORE = 50
"""Most records before a gradient norm that it is compared with."""


@rule("warning: a gradient norm is above 10 times the median of up to 50 records before it, and above max_grad_norm")
def gradient_spikes(run: RunFacts) -> Finding | None:
    norms = run.curves["grad_norm"]
    if len(norms) <= 10:
        return None
    # The least value before each, first: medians of all records would take long.
    high = norms.values[1:] > np.maximum(10 * np.minimum.accumulate(norms.values)[:-1], run.cfg.max_grad_norm)
    candidates = [int(index) for index in np.flatnonzero(high) + 1 if index >= 10]
    usual = {index: float(np.median(norms.values[max(0, index - BEFORE) : index])) for index in candidates}
    found = [index for index in candidates if norms.values[index] > 10 * usual[index]]
    if not found:
        return None
    worst = max(found, key=lambda index: norms.values[index])
    step = int(norms.steps[worst])
    rows = tuple(run.rows_of([step]).get(step, ()))
    sentence = f"The gradient norm jumps at {len(found)} step{'s' * (len(found) > 1)}, most at step {step:,}."
    evidence = (norms.at(worst), Evidence("median before", usual[worst]))
    advice = "look at these rows, for answers that are empty, alike or garbled; longer warm-up, or a lower learning_rate"
    return Finding("gradient_spikes", "warning", sentence, evidence, advice, rows)


@rule("steps were skipped for a loss or gradient that isn't finite; warning, and error from a tenth of all steps on")
def steps_skipped(run: RunFacts) -> Finding | None:
    skipped = run.curves["skipped_steps"]
    if not len(skipped) or not skipped.last:
        return None
    steps, rows = run.curves.last_step, run.rows_of(None)
    severity: Severity = "error" if skipped.last >= steps / 10 else "warning"
    evidence = (
        Evidence("skipped steps", skipped.last),
        Evidence("of steps", steps),
        skipped.at(int(np.flatnonzero(skipped.values)[0])),
    )
    sentence = "Steps were skipped, since their loss or gradient wasn't finite."
    named = rows[min(rows)] if rows else ()
    advice = "look at these rows; lower learning_rate; with fp16, use bf16: true"
    return Finding("steps_skipped", severity, sentence, evidence, advice, tuple(named))


# Data


@rule(
    "at the first step policy and reference differ by 5 % or more of the reference's log-probability; warning with a "
    "reference_model, error without, or from 50 % on"
)
def reference_differs(run: RunFacts) -> Finding | None:
    if not run.compares:
        return None
    apart, size, shown = 0.0, 0.0, []
    for side in ("chosen", "rejected"):
        rewards, logps = run.curves[f"rewards/{side}"], run.curves[f"logps/{side}"]
        # Later records are means over steps in which the policy has moved.
        if not len(rewards) or not len(logps) or rewards.steps[0] > 1:
            return None
        nats = rewards.first / run.beta
        apart, size = apart + abs(nats), size + abs(logps.first - nats)
        shown.append(Evidence(f"log(policy / reference) of {side}", nats, int(rewards.steps[0])))
    if apart < 0.05 * size:
        return None
    severity: Severity = "warning" if run.cfg.reference_model is not None and apart < 0.5 * size else "error"
    part = Evidence("apart, in % of the reference's log-probability", round(100 * apart / size, 1))
    sentence = "The reference isn't the model that training starts from: rewards aren't 0 at the first step."
    advice = "reference_model: the model that base_model names, unless another one is wanted; check both names"
    return Finding("reference_differs", severity, sentence, (*shown, part), advice)


@rule(
    "the reference prefers the rejected answer, per token, in 60 % of the pairs or more (95 % interval), by 0.1 nats or more; "
    "warning, and error from 75 % and 0.3 nats on",
    "arXiv 2405.19534: references rank about half of the pairs right",
)
def labels_flipped(run: RunFacts) -> Finding | None:
    if (gap := run.gap) is None:
        return None
    low, high = interval(gap.right, gap.pairs)
    if high > 0.4 or gap.gap > -0.1:
        return None
    severity: Severity = "error" if high < 0.25 and gap.gap < -0.3 else "warning"
    sentence = "The reference prefers the rejected answers: chosen and rejected may be swapped."
    evidence = (
        Evidence("% of pairs that the reference ranks right", round(100 * gap.right / gap.pairs, 1)),
        Evidence("interval from %", round(100 * low, 1)),
        Evidence("to %", round(100 * high, 1)),
        Evidence("pairs", gap.pairs),
        Evidence("chosen minus rejected, nats a token", gap.gap),
    )
    advice = "read some rows (`prefray prepare` prints three); swap field_chosen and field_rejected if they are wrong"
    return Finding("labels_flipped", severity, sentence, evidence, advice)


@rule("warning: at most a fifth of the first 4,000 training rows have prompts of their own, of 50 rows or more")
def few_prompts(run: RunFacts) -> Finding | None:
    rows = run.rows
    if rows is None or rows.looked_at < 50 or rows.prompts > rows.looked_at / 5:
        return None
    evidence = (Evidence("distinct prompts", rows.prompts), Evidence("training rows", rows.looked_at))
    advice = "more prompts; or fewer epochs, since every prompt is seen many times in each"
    return Finding("few_prompts", "warning", "Few prompts are behind many rows.", evidence, advice)


@rule("the 95 % interval of the evaluation's accuracy is wider than 20 points; warning below 30 pairs, else info")
def evaluation_is_small(run: RunFacts) -> Finding | None:
    accuracy = run.curves["eval_rewards/accuracies"]
    if not len(accuracy) or run.rows is None or not run.rows.evaluation:
        return None
    pairs = run.rows.evaluation
    low, high = interval(round(accuracy.last * pairs), pairs)
    if high - low <= 0.2:
        return None
    sentence = (
        f"An evaluation of {pairs} pairs is too small to tell accuracies apart that differ by less than {high - low:.2f}."
    )
    evidence = (
        Evidence("pairs evaluated", pairs),
        *((accuracy.at(0),) if len(accuracy) > 1 else ()),
        accuracy.at(-1),
        Evidence("95 % interval from", round(low, 3)),
        Evidence("to", round(high, 3)),
    )
    advice = "val_set_size: 200 or more rows (an interval of 14 points at most)"
    return Finding("evaluation_is_small", "warning" if pairs < 30 else "info", sentence, evidence, advice)


# Speed


@rule("more than a fifth of the tokens that are computed is padding, in batches of pairs; info, and warning from a half on")
def padding(run: RunFacts) -> Finding | None:
    real, fed = run.curves["tokens_per_second"], run.curves["fed_tokens_per_second"]
    if run.setup.get("packed") or run.strategy.batch_kind != "pair" or not len(real) or not len(fed):
        return None
    part = 1 - float(np.median(real.values)) / float(np.median(fed.values))
    if part <= 0.2:
        return None
    severity: Severity = "warning" if part >= 0.5 else "info"
    evidence = (
        Evidence("% of computed tokens that is padding", round(100 * part, 1)),
        Evidence("micro_batch_size", run.cfg.micro_batch_size),
    )
    # Where packing was asked for, the run's notes say why it isn't done.
    advice = "micro_batch_size: 1 with gradient_accumulation_steps" if run.cfg.sample_packing else "sample_packing: true"
    return Finding("padding", severity, "Batches are padded, not packed.", evidence, advice)


@rule("warning: a step waits for the data loader for more than a fifth of its time")
def data_waits(run: RunFacts) -> Finding | None:
    data, step = run.curves["seconds/data"], run.curves["seconds/step"]
    # The first record pays for the start of the loader's processes.
    if len(data) < 3 or len(step) != len(data):
        return None
    waited, whole = float(data.values[1:].sum()), float(step.values[1:].sum())
    if whole <= 0 or waited <= 0.2 * whole:
        return None
    sentence = f"Training waits for its data: {waited / whole:.0%} of a step."
    evidence = (
        Evidence("seconds/data (mean)", float(data.values[1:].mean())),
        Evidence("seconds/step (mean)", whole / (len(step) - 1)),
    )
    return Finding("data_waits", "warning", sentence, evidence, "dataloader_num_workers: 2 or more")


def interval(right: int, number: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share: `right` of `number` (Wilson, 1927)."""
    z = 1.959964
    share = right / number
    middle = (share + z * z / (2 * number)) / (1 + z * z / number)
    half = z / (1 + z * z / number) * math.sqrt(share * (1 - share) / number + z * z / (4 * number * number))
    return max(0.0, middle - half), min(1.0, middle + half)
