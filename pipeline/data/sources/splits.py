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
    config = known[chosen]
    folder = str(config.get("data_dir") or "").strip("./")
    inside = [one for one in names if not folder or one.startswith(f"{folder}/")]
    if not config.get("data_files"):
        return _by_name(inside) if folder and inside else {}
    found: dict[str, list[str]] = {}
    for split, pattern in _patterns(path, config["data_files"]):
        whole = f"{folder}/{pattern}" if folder else pattern.removeprefix("./")
        matching = [
            one for one in inside if fnmatch.fnmatchcase(one, whole) and (one.count("/") == whole.count("/") or "**" in whole)
        ]
        if not matching:
            raise UserError(f"path: the card of {path!r} names {pattern!r}, and there is no such file")
        found[split] = [*found.get(split, []), *(one for one in matching if one not in found.get(split, []))]
    return found


def _patterns(path: str, data_files: Any) -> list[tuple[str, str]]:
    """Split and pattern: text or a list are those of `train`; `{split, path}` entries, or a mapping, say which."""
    if isinstance(data_files, Mapping):
        data_files = [{"split": split, "path": pattern} for split, pattern in data_files.items()]
    entries = data_files if isinstance(data_files, list) else [data_files]
    found = []
    for entry in entries:
        split, given = (entry.get("split", "train"), entry.get("path")) if isinstance(entry, Mapping) else ("train", entry)
        given = given if isinstance(given, list) else [given]
        if not all(isinstance(pattern, str) for pattern in given):
            raise UserError(f"path: the card of {path!r} has data_files that are no patterns: {entry!r}")
        found += [(str(split), pattern) for pattern in given]
    return found


def _by_name(names: list[str]) -> dict[str, list[str]]:
    """The splits that names of shards, then of folders, then of files speak of; else all files are `train`."""
    for splits_of in (_of_shard, _of_folder, lambda name: _keywords(os.path.splitext(os.path.basename(name))[0])):
        splits: dict[str, list[str]] = {}
        for name in names:
            for split in splits_of(name):
                splits.setdefault(split, []).append(name)
        if splits:
            return splits
    return {"train": names}


def _of_shard(name: str) -> list[str]:
    match = SHARD.fullmatch(os.path.basename(name))
    return [match["split"]] if match else []


def _of_folder(name: str) -> list[str]:
    return next(filter(None, map(_keywords, os.path.dirname(name).split("/"))), [])


def _keywords(word: str) -> list[str]:
    """The splits that a word speaks of."""
    found = []
    for split, keywords in KEYWORDS.items():
        if re.search(rf"(?:^|{APART})(?:{'|'.join(keywords)})(?:{APART}|$)", word):
            found.append(split)
    return found
