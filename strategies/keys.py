"""Base of all config schemas: strict, frozen models with a description for every field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Keys", "key", "options_of"]


class Keys(BaseModel):
    """Base of every group of config keys: unknown keys are errors, values never change after validation."""

    # Keys may begin with `model_`, which pydantic reserves otherwise; YAML can write .inf and .nan.
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


@dataclass(frozen=True)
class _SetsOption:
    name: str


def key(description: str, default: Any = None, *, option: str | None = None, **constraints: Any) -> Any:
    """Return the field of a config key. Its default is defined only here; `None` means "not set".

    Args:
        description: unit, range and effect.
        default: value where a recipe doesn't have the key.
        option: the option of the pair losses that the key sets: a new name, under which they find its value in
            `strategies.losses.LossOptions.own`. The fields of `LossOptions` are set by arguments of the trainer.
        constraints: further arguments of pydantic's `Field`.
    """
    field = Field(default=default, description=description, **constraints)
    if option is not None:
        field.metadata.append(_SetsOption(option))  # not in `json_schema_extra`, which `prefray schema` would print
    return field


def options_of(keys: type[BaseModel]) -> dict[str, str]:
    """Return key -> option of the pair losses, for the keys that set one."""
    return {
        name: mark.name for name, field in keys.model_fields.items() for mark in field.metadata if isinstance(mark, _SetsOption)
    }
