"""Base of all config schemas: strict, frozen models with a description for every field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

__all__ = ["Keys", "key", "options_of"]


class Keys(BaseModel):
    """Base of every group of config keys: unknown keys are errors, values never change after validation."""

    # Keys may begin with `model_`, which pydantic reserves otherwise; YAML can write .inf and .nan.
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_boolean_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse YAML's true, yes and on for a number, which pydantic would take as 1."""
        if isinstance(value, bool) and info.field_name is not None:
            types = _types(cls.model_fields[info.field_name].annotation)
            if bool not in types and {int, float} & types:
                raise ValueError(f"must be a number, got {str(value).lower()}")
        return value


@dataclass(frozen=True)
class _SetsOption:
    name: str


def _types(annotation: Any) -> set[Any]:
    """Return the types in an annotation, those within unions and annotated ones too."""
    return {annotation}.union(*map(_types, get_args(annotation)))


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
