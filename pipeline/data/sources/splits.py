"""Which files of a folder belong to a split, as `datasets` finds them: by the card of the data set, else by their names."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Mapping
from typing import Any

from pipeline.errors import UserError

__all__ = ["files_of_split"]

SHARD = re.compile(r"(?P<split>\w+(?:\.\w+)*)-\d{5}-of-\d{5}.*")
KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
APART = r"[-._ 0-9]"
"""What stands around a keyword in a name."""
CARD = re.compile(r"---\s*\n(.*?)\n---", re.DOTALL)


def files_of_split(path: str, names: list[str], card: str, name: str | None, split: str | None) -> tuple[str, list[str]]:
    """A split's name, and its files.

    Args:
        path: the folder, for messages.
        names: its data files, by their paths within it.
        card: the text of its README.md, "" without one.
        name: the configuration of the card that is asked for.
        split: the split that is asked for, with a slice or without; the folder's only one, or `train`, when None.

    Raises:
        UserError: for a split or a configuration that there isn't.
    """
    splits = _by_card(path, names, card, name) or _by_name(names)
    wanted = split.split("[")[0] if split is not None else next(iter(splits)) if len(splits) == 1 else "train"
    if wanted in splits:
        return wanted, splits[wanted]
    if list(splits) == ["train"]:
        return "train", splits["train"]  # `locate` says that there is no other
    raise UserError(f"split: {path!r} has no split {wanted!r}; it has: {', '.join(sorted(splits))}")


def _by_card(path: str, names: list[str], card: str, name: str | None) -> dict[str, list[str]]:
    """The splits that `configs:` in the head of the card names."""
    import yaml

    head = CARD.match(card)
    try:
        configs = (yaml.safe_load(head[1]) or {}).get("configs") if head else None
    except (yaml.YAMLError, AttributeError):
        configs = None
    if not isinstance(configs, list) or not all(isinstance(config, Mapping) for config in configs) or not configs:
        return {}
    known = {str(config.get("config_name", "default")): config for config in configs}
    chosen = name or next((key for key, config in known.items() if config.get("default")), None)
    chosen = chosen or ("default" if "default" in known else next(iter(known)) if len(known) == 1 else None)
    if chosen not in known:
        raise UserError(f"name: {path!r} has the configurations {', '.join(known)}; got {name!r}")
    found = {split: _matching(names, patterns) for split, patterns in _patterns(known[chosen].get("data_files")).items()}
    return {split: files for split, files in found.items() if files}


def _patterns(data_files: Any) -> dict[str, list[str]]:
    """Patterns by split: text or a list are those of `train`; a list of `{split, path}` says which."""
    if isinstance(data_files, str):
        return {"train": [data_files]}
    if not isinstance(data_files, list):
        return {}
    if all(isinstance(one, str) for one in data_files):
        return {"train": data_files}
    paths = {str(one.get("split", "train")): one.get("path") for one in data_files if isinstance(one, Mapping)}
    return {split: [path] if isinstance(path, str) else list(path or []) for split, path in paths.items()}


def _matching(names: list[str], patterns: list[str]) -> list[str]:
    return [name for name in names if any(fnmatch.fnmatch(name, pattern.removeprefix("./")) for pattern in patterns)]


def _by_name(names: list[str]) -> dict[str, list[str]]:
    """The splits that names of shards, then of files, then of folders speak of; else all files are `train`."""
    for split_of in (_of_shard, lambda name: _keyword(os.path.splitext(os.path.basename(name))[0]), _of_folder):
        splits: dict[str, list[str]] = {}
        for name in names:
            if (split := split_of(name)) is not None:
                splits.setdefault(split, []).append(name)
        if splits:
            return splits
    return {"train": names}


def _of_shard(name: str) -> str | None:
    match = SHARD.fullmatch(os.path.basename(name))
    return match["split"] if match else None


def _of_folder(name: str) -> str | None:
    return next(filter(None, map(_keyword, os.path.dirname(name).split("/"))), None)


def _keyword(word: str) -> str | None:
    """The split that a word speaks of."""
    for split, keywords in KEYWORDS.items():
        if re.search(rf"(?:^|{APART})(?:{'|'.join(keywords)})(?:{APART}|$)", word):
            return split
    return None
