"""Checks before anything starts: every row fits the tokens of a forward, the model's positions and its embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.config import RunConfig
from pipeline.data.row_kinds import COMPLETIONS
from pipeline.data.store import EVAL, TRAIN
from pipeline.errors import UserError
from strategies.batch.plan import packed_tokens
from strategies.inference.eval_generations import NEW_TOKENS
from strategies.models.config import learned_positions, load_config
from strategies.models.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from pipeline.data import Prepared

__all__ = ["check_budget", "check_embeddings", "check_positions", "check_training_budget", "part_tokens", "scoring_budget"]

GRPO_NEW_TOKENS = 512
"""Default of `trl.max_completion_length`."""
LENGTHS = ["prompt_length", "chosen_length", "rejected_length"]


def scoring_budget(cfg: RunConfig) -> tuple[int, str]:
    """Return the most tokens of one scoring forward, and the key that sets it."""
    if cfg.ray.score.tokens_per_forward is not None:
        return cfg.ray.score.tokens_per_forward, "ray.score.tokens_per_forward"
    # A pair holds its prompt once and both completions, each within sequence_len together with the prompt.
    return cfg.tokens_per_forward or 2 * cfg.sequence_len, "tokens_per_forward"


def check_training_budget(cfg: RunConfig, prepared: Prepared) -> None:
    """Check the budget of training's packed rows, as `check_budget`; do nothing without packing.

    Raises:
        UserError: as `check_budget`.
    """
    if prepared.manifest["kind"] == "pair" and cfg.sample_packing:
        check_budget(prepared, cfg.tokens_per_forward or 2 * cfg.sequence_len, "tokens_per_forward")


def check_budget(prepared: Prepared, budget: int, key: str) -> None:
    """Check that no prepared pair takes more than `budget` tokens, its prompt counted once for both completions.

    Args:
        key: the config key that sets the budget.

    Raises:
        UserError: naming the longest row, its tokens, and so the smallest budget that fits.
    """
    too_long, longest = 0, (0, 0, "")
    for split in (TRAIN, EVAL):
        for part, table in zip(prepared.parts(split), prepared.tables(split, LENGTHS), strict=True):
            tokens = _tokens(table)
            too_long += int((tokens > budget).sum())
            if len(tokens) and tokens.max() > longest[0]:
                longest = (int(tokens.max()), int(tokens.argmax()), part)
    if not too_long:
        return
    most, index, part = longest
    source, number = _origin(prepared, part, index)
    others = f"; {too_long - 1} other row{'s are' if too_long > 2 else ' is'} too long as well" if too_long > 1 else ""
    raise UserError(
        f"{key}: {budget} tokens don't hold row {number} of {source}, which takes {most} (its prompt once, and both "
        f"completions){others}; the smallest budget that fits every row is {most}: set {key}: {most}, or a shorter sequence_len"
    )


def check_positions(cfg: RunConfig, prepared: Prepared) -> None:
    """Check that no prepared row, with its generated answer, exceeds the learned positions of policy or reference.

    Raises:
        UserError: naming the first such row, or for a model whose config can't be read.
    """
    generated = {EVAL: NEW_TOKENS if cfg.dpo_generate_during_eval else 0, TRAIN: 0}
    if prepared.manifest["kind"] == "prompt":
        new_tokens = (cfg.trl.max_completion_length if cfg.trl is not None else None) or GRPO_NEW_TOKENS
        generated = dict.fromkeys(generated, new_tokens)
    for key in ("base_model", "reference_model"):
        if getattr(cfg, key) is None:
            continue
        try:
            most = learned_positions(load_config(cfg, key))
        except ValueError as error:
            raise UserError(str(error)) from error
        # Rows are read only where the config alone can't rule it out.
        if most is not None and cfg.sequence_len + max(generated.values()) > most:
            _check_rows(cfg, prepared, generated, most, getattr(cfg, key))


def _check_rows(cfg: RunConfig, prepared: Prepared, generated: dict[str, int], most: int, model: str) -> None:
    answers = {"pair": ("chosen_length", "rejected_length"), "unpaired": ("completion_length",)}.get(
        prepared.manifest["kind"], ()
    )
    columns = ["prompt_length", *answers]
    rows = (
        (split, *row) for split in generated for row in zip(prepared.parts(split), prepared.tables(split, columns), strict=True)
    )
    for split, part, table in rows:
        prompts = table["prompt_length"].to_numpy()
        tokens = prompts + np.max([table[name].to_numpy() for name in answers] or [0], axis=0)
        # The longer of the row's own answers and the generated one.
        tokens = np.maximum(tokens, prompts + generated[split])
        if len(tokens) and tokens.max() > most:
            source, number = _origin(prepared, part, int(tokens.argmax()))
            left = most - generated[split]
            advice = f"set sequence_len: {left}" if left > 0 else "generate shorter answers (trl.max_completion_length)"
            raise UserError(
                f"sequence_len: row {number} of {source} has {tokens.max()} tokens"
                f"{f', with the {generated[split]} of an answer that is generated' * bool(generated[split])}, and "
                f"{model!r} has learned positions for {most}; {advice}"
            )


def check_embeddings(cfg: RunConfig, prepared: Prepared) -> None:
    """Check that `reference_model`, if set, has an embedding for each token of the rows.

    Missing embeddings would be initialised at random, and so would the log-probabilities of their tokens.

    Raises:
        UserError: naming the first missing token, and the number of rows with missing tokens.
    """
    if cfg.reference_model is None:
        return
    try:
        vocab_size, tokenizer = load_config(cfg, "reference_model").get_text_config().vocab_size, load_tokenizer(cfg)
        policy = load_config(cfg).get_text_config().vocab_size
    except ValueError as error:
        raise UserError(str(error)) from error
    if prepared.manifest["kind"] == "prompt" and (most := max(len(tokenizer), policy)) > vocab_size:
        # The policy may generate any row of its embeddings, also one that the tokenizer has no text for.
        raise UserError(
            f"reference_model: {cfg.reference_model!r} has embeddings for {vocab_size} tokens, and answers may have any of "
            f"{most}; give a reference that knows them, or leave special_tokens and tokens as they are there"
        )
    # No row can have a token that is missing, so none is read.
    if len(tokenizer) <= vocab_size:
        return
    rows, missing = 0, set[int]()
    names = [f"{name}_ids" for name in ("prompt", *COMPLETIONS[prepared.manifest["kind"]])]
    for table in (table for split in (TRAIN, EVAL) for table in prepared.tables(split, names)):
        affected = set[int]()
        for name in names:
            column = table[name].combine_chunks()
            ids, parents = column.flatten().to_numpy(), pc.list_parent_indices(column).to_numpy()
            missing |= set(ids[ids >= vocab_size].tolist())
            # Row indices, so a row with missing tokens in several columns counts once.
            affected |= set(parents[ids >= vocab_size].tolist())
        rows += len(affected)
    if missing:
        raise UserError(
            f"reference_model: {cfg.reference_model!r} has no embedding for {tokenizer.convert_ids_to_tokens(min(missing))!r}, "
            f"which {rows} rows have{f', nor for {len(missing) - 1} other tokens' * (len(missing) > 1)}; give a reference that "
            "was trained with them, or leave special_tokens and tokens as they are there"
        )


def part_tokens(prepared: Prepared, part: str) -> NDArray[np.int64]:
    """Return the tokens that each pair of a prepared part takes in a packed row, shape (rows,)."""
    return _tokens(prepared.read_part(part, LENGTHS))


def _tokens(lengths: pa.Table) -> NDArray[np.int64]:
    return packed_tokens(np.stack([lengths[name].to_numpy() for name in LENGTHS], axis=1).astype(np.int64))


def _origin(prepared: Prepared, part: str, index: int) -> tuple[str, int]:
    row = prepared.read_part(part, ["source", "row_number"]).slice(index, 1).to_pylist()[0]
    return row["source"], row["row_number"]
