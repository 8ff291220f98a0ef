"""Selection of the files of a split, as in `datasets`: by the dataset card of a folder, else by file names."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Mapping
from typing import Any

from pipeline.errors import UserError

__all__ = ["files_of_split"]

SHARD = re.compile(r"(?P<split>\w+(?:\.\w+)*)-(?P<number>\d{5})-of-(?P<all>\d{5})(?P<rest>.*)")
KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
DELIMITER = r"[-._ 0-9]"
"""Characters around a keyword in a name."""
CARD = re.compile(r"---\s*\n(.*?)\n---", re.DOTALL)


def files_of_split(path: str, names: list[str], card: str, name: str | None, split: str | None) -> tuple[str, list[str]]:
    """Return the name of the split and its files.

    Args:
        path: the folder, for messages.
        names: its data files, by their paths within it.
        card: the text of its README.md, "" without one.
        name: the requested configuration of the card.
        split: the requested split, with a slice or without; the folder's only one, or `train`, when None.

    Raises:
        UserError: for a split or a configuration that doesn't exist, or a missing shard.
    """
    # Precedence as in `datasets`: the card's configuration, then names of files and folders.
    by_card = _by_card(path, names, card, name)
    splits = by_card or _by_name(names)
    # A folder with one split needs no name for it, whatever that is.
    requested = split.split("[")[0] if split is not None else next(iter(splits)) if len(splits) == 1 else "train"
    if requested in splits:
        if (
            split is None
            and not by_card
            # Without a request, files that match no keyword would be left out silently.
            and (others := sorted(set(names) - {file for files in splits.values() for file in files}))
        ):
            raise UserError(
                f"path: the names of files in {path!r} say {', '.join(sorted(splits))}, but for {len(others)} of them, such as "
                f"{others[0]}; name the files that are meant (data_files), or the split"
            )
        _refuse_gaps(path, splits[requested])
        return requested, splits[requested]
    if list(splits) == ["train"]:
        return "train", splits["train"]  # `locate` raises for another one
    raise UserError(f"split: {path!r} has no split {requested!r}; it has: {', '.join(sorted(splits))}")


def _refuse_gaps(path: str, names: list[str]) -> None:
    """Raise UserError when a shard is missing, by the number of shards in the names of the others."""
    numbers: dict[tuple[str, ...], set[int]] = {}
    for name in names:
        if match := SHARD.fullmatch(os.path.basename(name)):
            key = (os.path.dirname(name), match["split"], match["all"], match["rest"])
            numbers.setdefault(key, set()).add(int(match["number"]))
    for (folder, split, number, rest), existing in numbers.items():
        first = 0 if 0 in existing else 1  # some count from 1
        if missing := sorted(set(range(first, int(number) + first)) - existing):
            name = os.path.join(folder, f"{split}-{missing[0]:05d}-of-{number}{rest}")
            raise UserError(f"path: {path!r} lacks {len(missing)} of {int(number)} shards, such as {name}; fetch it again")


def _by_card(path: str, names: list[str], card: str, name: str | None) -> dict[str, list[str]]:
    """Return the files of each split in `configs:` of the card's front matter; empty without any."""
    import yaml

    head = CARD.match(card)
    try:
        configs = (yaml.safe_load(head[1]) or {}).get("configs") if head else None
    except (yaml.YAMLError, AttributeError):
        configs = None
    if not isinstance(configs, list) or not all(isinstance(config, Mapping) for config in configs) or not configs:
        return {}
    by_name = {str(config.get("config_name", "default")): config for config in configs}
    # As `datasets` chooses: the requested one, the one marked as default, the one named so, or the only one.
    selected = name or next((key for key, config in by_name.items() if config.get("default")), None)
    selected = selected or ("default" if "default" in by_name else next(iter(by_name)) if len(by_name) == 1 else None)
    if selected not in by_name:
        raise UserError(f"name: {path!r} has the configurations {', '.join(by_name)}; got {name!r}")
    config = by_name[selected]
    folder = str(config.get("data_dir") or "").strip("./")
    inside = [file for file in names if not folder or file.startswith(f"{folder}/")]
    if not config.get("data_files"):
        return _by_name(inside) if folder and inside else {}
    splits: dict[str, list[str]] = {}
    for split, pattern in _patterns(path, config["data_files"]):
        whole = f"{folder}/{pattern}" if folder else pattern.removeprefix("./")
        matching = [
            file
            for file in inside
            # fnmatch's `*` also matches slashes; in a card's patterns only `**` does.
            if fnmatch.fnmatchcase(file, whole) and (file.count("/") == whole.count("/") or "**" in whole)
        ]
        if not matching:
            raise UserError(f"path: the card of {path!r} names {pattern!r}, and there is no such file")
        existing = splits.get(split, [])
        splits[split] = [*existing, *(file for file in matching if file not in existing)]
    return splits


def _patterns(path: str, data_files: Any) -> list[tuple[str, str]]:
    """Return (split, pattern) pairs: text or a list is of `train`; `{split, path}` entries, or a mapping, name the split."""
    if isinstance(data_files, Mapping):
        data_files = [{"split": split, "path": pattern} for split, pattern in data_files.items()]
    entries = data_files if isinstance(data_files, list) else [data_files]
    patterns = []
    for entry in entries:
        split, paths = (entry.get("split", "train"), entry.get("path")) if isinstance(entry, Mapping) else ("train", entry)
        paths = paths if isinstance(paths, list) else [paths]
        if not all(isinstance(pattern, str) for pattern in paths):
            raise UserError(f"path: the card of {path!r} has data_files that are no patterns: {entry!r}")
        patterns += [(str(split), pattern) for pattern in paths]
    return patterns


def _by_name(names: list[str]) -> dict[str, list[str]]:
    """Group files by the splits in names of shards, else of folders, else of files; else all files are `train`."""
    # The first way that assigns any file decides for all: a folder named `test` may hold files named `train-...`.
    for splits_of in (_of_shard, _of_folder, lambda name: _keywords(os.path.splitext(os.path.basename(name))[0])):
        splits: dict[str, list[str]] = {}
        for name in names:
            for split in splits_of(name):
                splits.setdefault(split, []).append(name)
        if splits:
            return splits
    return {"train": names}


def _of_shard(name: str) -> list[str]:
    # As in `datasets`: any name is a split within data/, elsewhere only one with a keyword.
    folder, base = os.path.split(name)
    match = SHARD.fullmatch(base)
    return [match["split"]] if match and (os.path.basename(folder) == "data" or _keywords(match["split"])) else []


def _of_folder(name: str) -> list[str]:
    return next(filter(None, map(_keywords, os.path.dirname(name).split("/"))), [])


def _keywords(word: str) -> list[str]:
    """Return the splits whose keywords occur in a word."""
    splits = []
    for split, keywords in KEYWORDS.items():
        if re.search(rf"(?:^|{DELIMITER})(?:{'|'.join(keywords)})(?:{DELIMITER}|$)", word, re.IGNORECASE):
            splits.append(split)
    return splits
