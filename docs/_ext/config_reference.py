"""The directive `config-keys GROUP`: every key of a group, as the schema has it when the site is built."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from docutils import nodes
from pydantic import BaseModel
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from pipeline.config import RunConfig
from strategies.methods.registry import STRATEGIES

__all__ = ["GROUPS", "Key", "all_keys", "setup"]

CLASSES = {
    "DataKeys": "data",
    "MethodKeys": "method",
    "DPOKeys": "method",
    "SimPOKeys": "method",
    "ORPOKeys": "method",
    "KTOKeys": "method",
    "ModelKeys": "model",
    "AdapterKeys": "adapter",
    "OptimizerKeys": "optimizer",
    "PairKeys": "batches",
    "TrainerKeys": "batches",
    "ClusterKeys": "ray",
    "GRPOKeys": "trl",
    "TrackerKeys": "trackers",
}
"""Class of the schema -> group in which a reader looks for its keys; those of other classes are in `others`."""
NAMES = {"eval_batch_size": "batches", "deepspeed": "sharding", "fsdp_config": "sharding", "tune": "tune", "select": "data"}
"""Key -> group, where it isn't its class's."""
CADENCE = ("eval", "save", "early_", "load_best", "metric_", "greater_", "logging_", "include_tokens", "profile", "output_dir")
"""How those keys of the training loop begin that are about checkpoints and evaluation."""
GROUPS = (*dict.fromkeys([*CLASSES.values(), "checkpoints", "sharding", "tune", "others"]),)


@dataclass(frozen=True)
class Key:
    """One key as its entry shows it."""

    path: str
    """Dotted; `*` stands for an index or a name of one's own."""
    group: str
    type: str
    default: str
    description: str
    readers: tuple[str, ...]
    """`rl:` values whose strategies read it; empty for a key that all do."""

    def markdown(self) -> str:
        """The entry, as MyST."""
        read = f" *Read by {', '.join(self.readers)}.*" if self.readers else ""
        text = _plain(self.description) + read
        return f"```{{confval}} {self.path}\n:type: {self.type}\n:default: {self.default}\n\n{text}\n```\n"


@cache
def all_keys() -> list[Key]:
    """Every key of a recipe, group by group in the order of the schema, a section before its keys.

    The keys of a section that stands in several places are those of the first.
    """
    order = [*CLASSES]
    classes = sorted(RunConfig.__mro__, key=lambda one: order.index(one.__name__) if one.__name__ in order else len(order))
    shown: set[type[BaseModel]] = set()
    return [
        key
        for declaring in classes
        for name in inspect.get_annotations(declaring)
        if name in RunConfig.model_fields
        for key in _keys(RunConfig, name, "", _group(declaring.__name__, name), shown)
    ]


def _group(declaring: str, name: str) -> str:
    if declaring == "TrainerKeys" and name not in NAMES and name.startswith(CADENCE):
        return "checkpoints"
    return NAMES.get(name) or CLASSES.get(declaring, "others")


def _keys(model: type[BaseModel], name: str, place: str, group: str, shown: set[type[BaseModel]]) -> Iterator[Key]:
    schema = _schema(model)
    path, given = f"{place}{name}", schema["properties"][name]
    field = model.model_fields[name]
    default = "required" if field.is_required() else _default(field.get_default(call_default_factory=True))
    yield Key(path, group, _type(given, schema.get("$defs", {})), default, given.get("description", ""), _readers(path))
    for inner, steps in _sections(field.annotation):
        if inner not in shown:
            shown.add(inner)
            for other in inner.model_fields:
                yield from _keys(inner, other, f"{path}.{steps}", group, shown)


@cache
def _schema(model: type[BaseModel]) -> dict[str, Any]:
    return model.model_json_schema()


def _sections(annotation: Any, steps: str = "") -> Iterator[tuple[type[BaseModel], str]]:
    """The models within an annotation, each with the steps of the path that lead to its keys."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, steps
    origin = typing.get_origin(annotation)
    inside = typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        for part in inside:
            yield from _sections(part, steps)
    elif origin is typing.Annotated:
        yield from _sections(inside[0], steps)
    elif origin in (list, dict):
        # Of a mapping to lists, an index is never needed: one item may stand without its list.
        yield from _sections(inside[-1], steps if steps else "*.")


def _readers(path: str) -> tuple[str, ...]:
    names = {path, path.split(".")[0]}
    readers = [rl for rl, strategy in STRATEGIES.items() if names & strategy.keys]
    return tuple(readers) if len(readers) < len(STRATEGIES) else ()


def _default(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, BaseModel) or value in ({}, []):
        return "the section's own"
    return f"`{value}`"


KINDS = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false", "object": "mapping"}
BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


def _type(schema: dict[str, Any], defs: dict[str, Any]) -> str:
    """A JSON schema in words."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_type(one, defs) for one in schema["anyOf"] if one.get("type") != "null"))
    if "$ref" in schema:
        return _type(defs[schema["$ref"].rsplit("/", 1)[1]], defs)
    if values := schema.get("enum", [schema["const"]] if "const" in schema else None):
        return ", ".join(f"`{value}`" for value in values)
    if schema.get("type") == "array":
        if "prefixItems" in schema:
            return f"list of {len(schema['prefixItems'])}: {_type(schema['prefixItems'][0], defs)}"
        return f"list of {_type(schema.get('items', {}), defs)}" if schema.get("items") else "list"
    kind = KINDS.get(schema.get("type", ""), "any value")
    bounds = [f"{words} {schema[name]}" for name, words in BOUNDS.items() if name in schema]
    return ", ".join([kind, *bounds]) if bounds else kind


def _plain(description: str) -> str:
    """A description in which brackets outside of code are no links."""
    parts = description.split("`")
    return "`".join(part.replace("[", r"\[") if index % 2 == 0 else part for index, part in enumerate(parts))


class ConfigKeys(SphinxDirective):
    """`config-keys GROUP`."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        group = self.arguments[0]
        if group not in GROUPS:
            raise self.error(f"config-keys: no group {group!r}; there are: {', '.join(GROUPS)}")
        # The page has to be made again when the schema changes, which Sphinx can't see.
        self.env.note_reread()
        text = "\n".join(key.markdown() for key in all_keys() if key.group == group)
        return self.parse_text_to_nodes(text)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("config-keys", ConfigKeys)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
