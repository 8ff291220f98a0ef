"""Whether a run learns at all, and from the model that it should: rules of `rules.py`, which says when they find something."""

from __future__ import annotations

import math

import numpy as np

from pipeline.findings.facts import RunFacts
from pipeline.ui.findings import Evidence, Finding, Severity

__all__ = ["learning_rate_is_zero", "loss_above_start", "loss_stays", "reference_differs", "rewards_alike"]

NO_RATE = 1e-10
"""A learning rate below this changes no weight in float32 or bfloat16 within any run."""


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


def loss_above_start(run: RunFacts) -> Finding | None:
    loss = run.curves["loss"]
    if not run.has_fixed_start or len(loss) < 4 or reference_differs(run) is not None:
        return None
    name, advice = "loss_above_start", "lower learning_rate tenfold, or warm up longer"
    if loss.end > 1.25 * abs(loss.first):
        sentence = "The run diverges: its loss ends above that of a model that hasn't been trained."
        return Finding(name, "error", sentence, (loss.at(0), loss.ends()[1]), advice)
    if np.sort(loss.values)[-2] > 2 * abs(loss.first):
        sentence = "The loss went far above that of a model that hasn't been trained, before it fell."
        return Finding(name, "warning", sentence, (loss.at(0), loss.at(int(loss.values.argmax())), loss.at(-1)), advice)
    return None


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


def rewards_alike(run: RunFacts) -> Finding | None:
    alike = run.curves["frac_reward_zero_std"]
    if len(alike) < 2 or (mean := float(alike.values.mean())) < 0.9:
        return None
    sentence = "Nearly all groups of completions get one and the same reward, so there is nothing to learn from."
    advice = "take prompts that the model solves sometimes, raise trl.num_generations or trl.temperature, or grade finer"
    evidence = (Evidence("frac_reward_zero_std (mean)", mean), alike.at(-1))
    return Finding("rewards_alike", "error", sentence, evidence, advice)
