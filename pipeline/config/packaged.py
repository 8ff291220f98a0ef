"""Packaged recipes by name, with the sources and hardware in their header comments. Loads without torch."""

from __future__ import annotations

import importlib.resources
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

__all__ = ["PackagedRecipe", "is_packaged", "packaged_recipe", "recipe_names"]

FOLDER = importlib.resources.files("pipeline") / "recipes"


@dataclass(frozen=True)
class PackagedRecipe:
    """One recipe of `pipeline/recipes`."""

    name: str
    text: str

    @property
    def model(self) -> str:
        """The base model."""
        return self._values["base_model"]

    @property
    def method(self) -> str:
        """The values of `rl`, of which a sweep may have several."""
        tune = self._values.get("tune")
        searched = tune["space"].get("rl", {}).get("choice") if tune else None
        return ", ".join(searched or [self._values["rl"]]) + (" (sweep)" if tune else "")

    @property
    def _values(self) -> dict[str, Any]:
        return yaml.safe_load(self.text)

    @property
    def sources(self) -> list[str]:
        """URLs or papers that published its settings, in the order of their numbers."""
        return re.findall(r"^# Source(?: \[\d\])?: (\S.*)$", self.text, flags=re.MULTILINE)

    @property
    def hardware(self) -> str:
        """The hardware that its settings were published for; "" when unpublished."""
        match = re.search(r"^# Hardware: (.*)$", self.text, flags=re.MULTILINE)
        return match[1] if match else ""


def recipe_names() -> list[str]:
    """Return the sorted names of the packaged recipes; the file of each is its name and `.yaml`."""
    return sorted(path.name.removesuffix(".yaml") for path in FOLDER.iterdir() if path.name.endswith(".yaml"))


def packaged_recipe(name: str) -> PackagedRecipe:
    """Load the packaged recipe of a name in `recipe_names`."""
    return PackagedRecipe(name, (FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))


def is_packaged(recipe: str | Path, folder: Path = Path()) -> bool:
    """Return whether a recipe requested in `folder` is a packaged one: a file of that name takes precedence."""
    return str(recipe) in recipe_names() and not (folder / recipe).is_file()
