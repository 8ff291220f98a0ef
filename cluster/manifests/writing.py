"""YAML that a person can read and edit."""

from __future__ import annotations

from typing import Any

import yaml

__all__ = ["documents", "header"]


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks, and values that stand twice written twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def documents(*values: dict[str, Any]) -> str:
    """Mappings as the documents of one YAML file, keys in their order."""
    texts = [yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120) for value in values]
    return "---\n".join(texts)


def header(*lines: str) -> str:
    """Comment lines."""
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)
