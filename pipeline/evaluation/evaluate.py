"""`prefray evaluate`: metrics of a trained policy on held-out pairs and prompts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.data import prepare
from pipeline.data.mapped import read_checked
from pipeline.data.pictures import IMAGES
from pipeline.data.store import EVAL, TRAIN, open_store, prepared_root
from pipeline.errors import UserError
from pipeline.evaluation.generate_on_ray import Prompt, SamplingOptions, answer_prompts, check_sampling
from pipeline.evaluation.pairs import PAIR_METRICS, pair_values
from pipeline.evaluation.resolve_models import Subject, find_subject, with_data
from pipeline.evaluation.result import Evaluation
from pipeline.evaluation.rewards import Judge, add_rewards, load_judges
from pipeline.evaluation.statistics import estimates
from pipeline.ray.session import init_ray
from pipeline.reference import check_given_reference, check_pictures
from pipeline.ui.display import Display
from pipeline.ui.notebook import default_display

if TYPE_CHECKING:
    import pandas

    from pipeline.data import Prepared

__all__ = ["evaluate"]


def evaluate(
    run: str,
    data: Sequence[str] = (),
    type: str | None = None,
    split: str | None = None,
    reference: str | None = None,
    rewards: Sequence[str] = (),
    answers: int = 64,
    options: SamplingOptions | None = None,
    confidence: float = 0.95,
    overrides: Iterable[str] = (),
    display: Display | None = None,
    trust: bool = False,
) -> Evaluation:
    """Evaluate a policy on pairs and on generated answers, with actors of Ray Data.

    Pairs give the metrics of training's evaluations (accuracies, margins, log-ratios), also per source. Answers of policy and
    reference to distinct prompts, taken from the sources in turn, give their length, an estimate of KL(policy || reference) in
    nats per answer, and for each reward function its mean and the policy's win rate over the reference (ties count half).
    Intervals are bootstrapped over rows.

    Args:
        run: output_dir of a finished run; or a model or an adapter, which need `data`.
        data: files, folders or hub ids with pairs (for a grpo run with prompts), in place of the run's evaluation rows.
        type: dataset type of `data`.
        split: split of `data`, or a slice of it.
        reference: model or adapter to compare with; by default the model that the policy was trained from.
        rewards: reward functions by dotted path, as GRPO's; by default those of a grpo run.
        answers: number of prompts to answer; 0 for none.
        options: sampling options of the answers.
        confidence: confidence level of the intervals, between 0 and 1.
        overrides: `key=value` overrides of the recipe.
        display: shows stages and progress; when None, progress is shown in a notebook and nothing elsewhere.
        trust: allow code that the run's config names: plugins, reward functions, code of the model's repository.

    Raises:
        UserError: when `run` is no finished run or model, names code without trust, or its data don't fit the evaluation.
        RunFailed: when actors died repeatedly.
    """
    display, options = display or default_display(), options or SamplingOptions()
    _check(answers, options, confidence)
    for name, value in (("--type", type), ("--split", split)):
        if value is not None and not data:
            raise UserError(f"{name}: is of --data, and there is none; give it, or remove {name}")
    subject = find_subject(str(run), reference, list(overrides), trust, rewards=bool(answers) and not rewards)
    # Before the data are prepared: a path that doesn't import fails at once.
    judges = load_judges(rewards) if rewards or not answers else _judges_of_run(subject)
    if rewards and not answers:
        raise UserError("--reward: judges answers, and --answers is 0; give a number of prompts to answer")
    display.stage("preparing data")
    prepared, split_name = _rows(subject, data, type, split, display)
    for model in filter(None, (subject.policy, subject.reference)):
        has_pictures = check_pictures(model, prepared) is not None
    if has_pictures and subject.reference is not None and subject.given_reference is not None:
        check_given_reference(subject.policy, subject.reference, subject.given_reference)
    kind, notes = prepared.manifest["kind"], _left_out(prepared) if data else []
    if kind != "pair" and not answers:
        raise UserError(
            f"{run}: its data are no pairs but {WORDS[kind]}, which give no accuracy or margin; give pairs with --data, or "
            "let it answer prompts (--answers)"
        )
    if subject.reference is None:
        notes.append("no reference: log-ratios, KL and win rates need one (--reference)")
    init_ray(subject.cfg)
    pairs = None
    if kind == "pair":
        pairs = pair_values(subject, prepared, split_name, display.stage, display.progress)
    else:
        notes.append(f"the data are {WORDS[kind]}: accuracies and margins need pairs (--data)")
    table = None
    if answers:
        display.stage("answering prompts")
        # A list: it is read for the answers, and again for the rewards.
        prompts = list(_prompts(prepared, split_name, answers))
        table = add_rewards(answer_prompts(subject, prompts, options, display.progress), prompts, judges)
        if table["logratio"].isna().all() and subject.reference is not None:
            notes.append("kl: answers that aren't drawn at temperature 1 from all tokens don't estimate it")
    return _result(subject, pairs, table, confidence, tuple(notes))


LEFT_OUT = {"rejected": "can't be used", "too_long": "are too long", "duplicates": "are duplicates", "truncated": "are cut"}
WORDS = {"pair": "pairs", "unpaired": "labelled completions", "prompt": "prompts"}


def _check(answers: int, options: SamplingOptions, confidence: float) -> None:
    if answers < 0:
        raise UserError(f"--answers: must be 0 or more, got {answers}")
    if not 0 < confidence < 1:
        raise UserError(f"--confidence: must be between 0 and 1, such as 0.95, got {confidence:g}")
    check_sampling(options)


def _judges_of_run(subject: Subject) -> list[Judge]:
    trl = subject.cfg.trl
    # A path with a slash is a reward model's folder or hub id, which TRL calls and evaluation can't.
    functions = [path for path in (trl.reward_funcs if trl is not None else None) or [] if "/" not in path]
    return load_judges(functions, "trl.reward_funcs")


def _rows(
    subject: Subject, data: Sequence[str], type_: str | None, split: str | None, display: Display
) -> tuple[Prepared, str]:
    """Return the prepared data to evaluate on, and the name of their split."""
    if data:
        # Under TRAIN: `with_data` splits nothing off, so all rows are there.
        return prepare(with_data(subject.cfg, data, type_, split), progress=display.progress), TRAIN
    if subject.prepared is None:
        raise UserError(f"--data: {subject.name!r} is no run, so it has no evaluation rows; give pairs")
    # By the run's own fingerprint, which also finds rows whose source files are gone.
    store = open_store(prepared_root(subject.cfg.dataset_prepared_path).subfolder(subject.prepared))
    prepared = store or prepare(subject.cfg, progress=display.progress)
    if not prepared.eval_rows:
        raise UserError(f"--data: the run in {subject.name!r} has no evaluation rows (val_set_size, test_datasets); give pairs")
    return prepared, EVAL


def _left_out(prepared: Prepared) -> list[str]:
    """Return a note about rows that aren't evaluated, if there are any."""
    sources = prepared.manifest["sources"]
    counts = {words: sum(source[name] for source in sources) for name, words in LEFT_OUT.items()}
    text = ", ".join(f"{number} {words}" for words, number in counts.items() if number)
    return [f"of {sum(source['read'] for source in sources)} rows, {text}"] if text else []


def _prompts(prepared: Prepared, split: str, number: int) -> Iterator[Prompt]:
    """Yield the first distinct prompts, round-robin over the sources."""
    kind = prepared.manifest["kind"]
    pictures = [IMAGES] if prepared.manifest.get("pictures") else []
    columns = ["prompt_ids", "prompt", "source", *(["row"] if kind == "prompt" else []), *pictures]
    for row in _rows_at(prepared, split, _first_prompts(prepared, split, number, pictures), columns):
        columns_of_row = json.loads(row["row"]) if kind == "prompt" else {}
        # Messages where the row has them: reward functions receive prompts as in training.
        content = columns_of_row.pop("prompt", row["prompt"])
        images = tuple(_picture(prepared, name) for name in row.get(IMAGES) or ())
        if pictures:
            # For reward functions, as TRL gives them; as paths where there are any, which cost nothing where none is opened.
            columns_of_row[IMAGES] = list(images)
        yield Prompt(row["prompt_ids"], row["prompt"], content, row["source"], columns_of_row, images)


def _first_prompts(prepared: Prepared, split: str, number: int, pictures: list[str]) -> list[int]:
    """Return the row indices of the first distinct prompts, taken from the sources in turn, ascending."""
    seen: set[bytes] = set()
    by_source: dict[str, list[int]] = {}
    start = 0
    for table in prepared.tables(split, ["source", "prompt", "prompt_length", *pictures]):
        for index, row in enumerate(table.to_pylist(), start):
            # The same question about another picture is another prompt. Hashes, as the texts may not fit into memory.
            asked = hashlib.blake2b(repr((row["prompt"], *(row[name] for name in pictures))).encode(), digest_size=16).digest()
            if row["prompt_length"] > 0 and asked not in seen:
                seen.add(asked)
                found = by_source.setdefault(row["source"], [])
                found += [index] * (len(found) < number)
        start += len(table)
    # Sorted by row again, so that sources aren't interleaved in the results.
    in_turn = sorted((rank, index) for found in by_source.values() for rank, index in enumerate(found))
    return sorted(index for _, index in in_turn[:number])


def _rows_at(prepared: Prepared, split: str, indices: list[int], columns: list[str]) -> Iterator[dict[str, Any]]:
    """Yield some rows of a split, in order; parts without any aren't read."""
    start, rows = 0, {entry["file"]: entry["rows"] for entry in prepared.manifest["files"]}
    for part in prepared.parts(split):
        here = [index - start for index in indices if start <= index < start + rows[part]]
        yield from prepared.read_part(part, columns).take(here).to_pylist() if here else ()
        start += rows[part]


def _picture(prepared: Prepared, name: str) -> str | bytes:
    """Return the path of a picture; of a store at a URI its bytes, since only a few are asked about."""
    if prepared.folder.is_local:
        return str(Path(prepared.folder.path, IMAGES, name))
    return read_checked(prepared.folder, {"file": f"{IMAGES}/{name}"}, "the pictures of the rows")


def _result(
    subject: Subject,
    pairs: pandas.DataFrame | None,
    answers: pandas.DataFrame | None,
    confidence: float,
    notes: tuple[str, ...],
) -> Evaluation:
    def metrics(source: str | None) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for table, columns in ((pairs, _pair_columns), (answers, _answer_columns)):
            if table is not None:
                rows = table if source is None else table[table["source"] == source]
                merged |= estimates(columns(rows), confidence) if len(rows) else {}
        return merged

    sources = dict.fromkeys(name for table in (pairs, answers) if table is not None for name in table["source"])
    # With a single source it would repeat the metrics of all rows.
    by_source = {source: metrics(source) for source in sources} if len(sources) > 1 else {}
    return Evaluation(subject.name, subject.reference_name, metrics(None), by_source, confidence, pairs, answers, notes)


def _pair_columns(table: pandas.DataFrame) -> dict[str, Any]:
    return {name: table[name].to_numpy() for name in PAIR_METRICS if name in table}


def _answer_columns(table: pandas.DataFrame) -> dict[str, Any]:
    columns = {"answers/length": table["policy_length"], "answers/cut": table["policy_cut"]}
    if "reference" in table:
        columns |= {"answers/reference_length": table["reference_length"]}
        # All NaN where sampling wasn't from the policy's own distribution.
        columns |= {"answers/kl": table["logratio"]} if not table["logratio"].isna().all() else {}
    for name in (str(name).removeprefix("reward/") for name in table if str(name).startswith("reward/")):
        columns[f"answers/reward/{name}"] = table[f"reward/{name}"]
        if f"win/{name}" in table:
            columns[f"answers/reference_reward/{name}"] = table[f"reference_reward/{name}"]
            columns[f"answers/win_rate/{name}"] = table[f"win/{name}"]
    return {name: values.to_numpy(dtype=np.float64) for name, values in columns.items()}
