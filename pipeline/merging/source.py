"""What is merged: the adapter of a run, or one in a folder, and the base model that it was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.config import RunConfig, parse_saved, parse_yaml
from pipeline.config.trust import refuse_code_of_run
from pipeline.data.store import EVAL, TRAIN, Prepared, open_store, prepared_root
from pipeline.errors import UserError
from pipeline.io.remote_models import bring_remote
from pipeline.io.storage import Folder, Location, inside, is_uri, locate
from pipeline.runs.finished import finished_run, holds_run
from pipeline.runs.folder import CONFIG, RunFolder
from strategies.config import StrategyConfig, as_config
from strategies.merging.policy import read_adapter_config
from strategies.models.location import ADAPTER_CONFIG

__all__ = ["MOST_TOKENS", "Source", "open_source"]

MERGED = "merged"
ROWS, TOKENS = 4, 128
"""Sequences that a merged model is verified on, and tokens of each at most."""
MOST_TOKENS = 4 * (ROWS + 1) * TOKENS
"""Tokens whose logits are in memory at once, at most."""
COMPLETIONS = {"pair": ["chosen_ids"], "unpaired": ["completion_ids"], "prompt": []}
"""What follows a prompt, by the kind of the prepared rows."""
SENTENCES = (
    "Question: how many legs does a spider have? Answer: a spider has eight legs, two more than an insect.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "Dear Ms. Ivanova,\n\nthank you for your letter of 3 May. The invoice (EUR 1,249.50) was paid on Friday.\n",
    "Die Brücke wurde 1932 gebaut; seitdem fahren täglich rund 4.000 Züge über den Fluss.",
)


@dataclass(frozen=True)
class Source:
    """An adapter and its base."""

    given: str
    cfg: StrategyConfig
    """The run's config, or one that names the base alone."""
    adapter: Path
    output: Location | None
    """Default destination of the merged model."""
    base_fingerprint: str | None = None
    """Of the base model that the run began with."""
    prepared: Prepared | None = None
    """The data that it was trained on, where they are still there."""

    def samples(self, tokenizer: Any, special: list[int]) -> tuple[list[list[int]], str]:
        """Return sequences of token ids to verify a merged model on, and in words where they are from.

        They are evaluation rows of the run, training rows where it has none, or else built-in sentences.

        Args:
            special: tokens whose embeddings the adapter has changed by themselves, which otherwise might not occur.
        """
        found, origin = _rows(self.prepared) if self.prepared is not None else ([], "")
        if not found:
            found, origin = [tokenizer(text)["input_ids"][:TOKENS] for text in SENTENCES], "built-in sentences"
        # The changed tokens are a sequence of their own: real rows may not have them.
        return [ids for ids in [*found, special[:TOKENS]] if ids], origin


def _rows(prepared: Prepared) -> tuple[list[list[int]], str]:
    split, name = (EVAL, "evaluation") if prepared.eval_rows else (TRAIN, "training")
    columns = ["prompt_ids", *COMPLETIONS[prepared.manifest["kind"]]]
    # Part by part: no more are read than are needed.
    first = (row for table in prepared.tables(split, columns) for row in table.slice(0, ROWS).to_pylist())
    rows = [[token for column in columns for token in row[column]][:TOKENS] for row in islice(first, ROWS)]
    return rows, f"{name} rows of the run"


def open_source(given: str, base: str | None, trust: bool = False) -> Source:
    """Find the adapter that `given` names; one at a URI is brought into this machine's cache.

    Args:
        given: `output_dir` of a run, or a folder with an adapter.
        base: place of the base model, where it isn't the one that the run or the adapter names.
        trust: whether code that a run's config names may run here.

    Raises:
        UserError: when there is no finished adapter, and for a config that names code.
        ValueError: when it is of a kind that can't be merged.
    """
    where = locate(given)
    if not holds_run(where):
        _refuse_what_is_no_adapter(given, where)
        return _of_adapter(given, _here(where), where, base)
    folder, state = finished_run(given, where)
    if ADAPTER_CONFIG not in Folder(folder.model).names():
        raise UserError(f"{given!r} trained all weights, so there is nothing to merge: its model is {folder.model}")
    text = folder.storage.read(CONFIG) or ""
    # Before `parse_saved`, which loads the plugins that the config names.
    if not trust:
        refuse_code_of_run(given, parse_yaml(text, str(folder.config)))
    cfg = parse_saved(text, str(folder.config))
    return _of_run(given, folder, state, cfg, _here(folder.model, cfg), base)


def _here(adapter: Location, cfg: RunConfig | None = None) -> Path:
    return adapter if isinstance(adapter, Path) else bring_remote("RUN|ADAPTER", adapter, cfg)


def _refuse_what_is_no_adapter(given: str, where: Location) -> None:
    if isinstance(where, Path) and where.is_file():
        raise UserError(f"{given!r} is a file; give the output_dir of a finished run, or a folder with {ADAPTER_CONFIG}")
    names = Folder(where).names()
    if ADAPTER_CONFIG in names:
        return
    if "config.json" in names:
        raise UserError(f"{given!r} holds a whole model, so there is nothing to merge")
    is_empty = "is empty" if not isinstance(where, Path) or where.is_dir() else "is not there"
    what = "holds no run and no adapter" if names else is_empty
    raise UserError(f"{given!r} {what}; give the output_dir of a finished run, or a folder with {ADAPTER_CONFIG}")


def _of_run(given: str, folder: RunFolder, state: dict[str, Any], cfg: RunConfig, adapter: Path, base: str | None) -> Source:
    # Unverified: a few rows to compare on, whatever became of the others.
    prepared = open_store(prepared_root(cfg.dataset_prepared_path).subfolder(state["prepared"]), verify=False)
    if base is not None:
        cfg = cfg.model_copy(update={"base_model": base})
    return Source(given, cfg, adapter, inside(folder.path, MERGED), state.get("base"), prepared)


def _of_adapter(given: str, adapter: Path, where: Location, base: str | None) -> Source:
    named = base or read_adapter_config(adapter).base_model_name_or_path
    if not named:
        raise UserError(f"{given!r}: {ADAPTER_CONFIG} doesn't say which base model the adapter belongs to; give it with --base")
    beside = None if is_uri(str(where)) else Path(where).with_name(f"{Path(where).name}-{MERGED}")
    # The method doesn't matter to a merge; a config needs one.
    return Source(given, as_config({"base_model": named, "rl": "dpo"}), adapter, beside)
