"""Who is evaluated, and against whom: a run, a model or an adapter, by what a person gives."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.config import DatasetConfig, RunConfig, parse_config
from pipeline.config.datasets import dataset_problems
from pipeline.config.loading import apply_overrides
from pipeline.errors import ConfigError, UserError
from pipeline.paths import absolute_paths
from pipeline.storage import Location, fetch, is_uri, locate
from pipeline.training.finished import EXPECTED, finished_run, holds_run
from pipeline.training.folder import CONFIG
from strategies.locations import ADAPTER_CONFIG, resolve_model_location
from strategies.registry import get_strategy

__all__ = ["Subject", "find_subject", "with_data"]

PREPARED = "last_run_prepared"


@dataclass(frozen=True)
class Subject:
    """A policy and its reference, each as a config whose reference policy is that model: what the score stage computes."""

    name: str
    """As it was given."""
    cfg: RunConfig
    """The run's recipe; of a model without a run one with defaults."""
    policy: RunConfig
    reference: RunConfig | None
    """None where nothing says what the model was trained from."""
    prepared: str | None = None
    """Fingerprint of the data that the run was trained on."""

    @property
    def reference_name(self) -> str | None:
        """What is compared with, for a person."""
        if self.reference is None:
            return None
        keys = ("reference_model", "lora_model_dir", "base_model")
        return next(name for key in keys if (name := getattr(self.reference, key)) is not None)

    @property
    def beta(self) -> float:
        """Scale of the implicit rewards: the run's."""
        return get_strategy(self.cfg.rl).reward_scale(self.cfg)

    @property
    def rewards_need_reference(self) -> bool:
        """Whether the run's rewards compare with a reference: those of simpo and orpo don't."""
        strategy = get_strategy(self.cfg.rl)
        return strategy.requires_reference or strategy.batch_kind == "prompt"


def find_subject(given: str, reference: str | None = None, overrides: Iterable[str] = ()) -> Subject:
    """What a person means by RUN or MODEL.

    Args:
        given: the output_dir of a finished run, a path or a URI; a model; or an adapter.
        reference: a model or an adapter to compare with, in place of what the policy was trained from.
        overrides: `key=value`, of the recipe.

    Raises:
        UserError: for a run that isn't there or isn't finished, and for what is no model.
    """
    where = locate(given)
    if is_uri(given) or holds_run(where):
        subject = _of_run(given, where, overrides)
    elif (Path(where) / ADAPTER_CONFIG).is_file():
        cfg = absolute_paths(_recipe({"base_model": _base_of(Path(where)), **_tokenizer_of(Path(where))}, overrides))
        subject = Subject(given, cfg, _scored(cfg, lora_model_dir=str(where), adapter="lora"), _scored(cfg))
    else:
        _check_model(given, "RUN|MODEL")
        cfg = absolute_paths(_recipe({"base_model": given}, overrides))
        subject = Subject(given, cfg, _scored(cfg), None)
    if reference is None:
        return subject
    other = _model(subject.cfg, reference, "--reference")
    _check_tokenizer(subject.policy, reference, other)
    return Subject(given, subject.cfg, subject.policy, other, subject.prepared)


def _of_run(given: str, where: Location, overrides: Iterable[str]) -> Subject:
    folder, state = finished_run(given, where)
    text = folder.storage.read(CONFIG) or ""
    values = apply_overrides(yaml.safe_load(text), overrides)
    cfg = absolute_paths(parse_config(values, origin=str(folder.config)).model_copy(update={"tune": None}))
    # Beside the prepared data, which all nodes share.
    model = fetch(folder.model, Path(cfg.dataset_prepared_path, "fetched", str(state.get("id")), f"step-{state['step']}"))
    if (model / ADAPTER_CONFIG).is_file():
        policy = _scored(cfg, lora_model_dir=str(model), adapter=cfg.adapter or "lora", reference_model=None)
    else:
        policy = _scored(cfg, reference_model=str(model))
    return Subject(given, cfg, policy, _scored(cfg), state.get("prepared"))


def _scored(cfg: RunConfig, **keys: Any) -> RunConfig:
    """`cfg` as a recipe whose cached reference is a model of its own: which method trained it doesn't matter."""
    plain = {"rl": "dpo", "reference": "cached", "trl": None, "dpo_generate_during_eval": False, "tune": None}
    return cfg.model_copy(update={**plain, **keys})


def _model(cfg: RunConfig, given: str, what: str) -> RunConfig:
    """A model or an adapter as a config whose reference it is."""
    where = Path(os.path.expanduser(given)).absolute()
    if (where / ADAPTER_CONFIG).is_file():
        keys = {"base_model": _base_of(where), "lora_model_dir": str(where), "adapter": "lora"}
        return _scored(absolute_paths(cfg.model_copy(update={**keys, "reference_model": None})))
    _check_model(given, what)
    return _scored(absolute_paths(cfg.model_copy(update={"reference_model": given})))


def _check_tokenizer(policy: RunConfig, given: str, reference: RunConfig) -> None:
    """Refuse a reference to which the policy's tokens mean something else; one without a tokenizer is believed."""
    from strategies.tokenizer import load_tokenizer

    nothing = {"tokens": None, "special_tokens": None, "chat_template": None, "chat_template_jinja": None}
    where = reference.reference_model or reference.base_model
    try:
        other = load_tokenizer(reference.model_copy(update={"base_model": where, "tokenizer_config": None, **nothing}))
    except ValueError:
        return
    own = load_tokenizer(policy).get_vocab()
    if different := [token for token, number in other.get_vocab().items() if own.get(token, number) != number]:
        raise UserError(
            f"--reference: {given!r} has another tokenizer ({len(different)} tokens differ, such as {different[0]!r}); "
            "a reference must read the policy's tokens"
        )


def _base_of(adapter: Path) -> str:
    try:
        base = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError, OSError) as error:
        raise UserError(f"{adapter / ADAPTER_CONFIG} can't be read: {error}") from error
    if not base:
        raise UserError(f"{adapter / ADAPTER_CONFIG} names no base model (base_model_name_or_path); write it there")
    return base


def _tokenizer_of(adapter: Path) -> dict[str, str]:
    """The tokenizer that was saved beside an adapter: with the chat template and the tokens that it was trained with."""
    return {"tokenizer_config": str(adapter)} if (adapter / "tokenizer_config.json").is_file() else {}


def _check_model(given: str, what: str) -> None:
    """Say now what is no model; a hub id is believed until it is loaded."""
    try:
        location = resolve_model_location(given, what)
    except ValueError as error:
        raise UserError(f"{error}; {EXPECTED}") from error
    folder = Path(location.path)
    if location.is_gguf:
        if not _begins_with(folder / location.kwargs["gguf_file"], b"GGUF"):
            raise UserError(f"{given!r} is no GGUF file; {EXPECTED}")
    elif not folder.exists():
        if "/" not in given:
            raise UserError(f"no such folder: {given!r}; {EXPECTED}")
    elif not (folder / "config.json").is_file():
        raise UserError(
            f"{given!r} is no run, model or adapter (no run.json, config.json or {ADAPTER_CONFIG} in it); {EXPECTED}"
        )
    elif not _has_weights(folder):
        raise UserError(f"{given!r} holds a model's config and no weights (*.safetensors or *.bin); {EXPECTED}")


def _has_weights(folder: Path) -> bool:
    return any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir())


def _begins_with(file: Path, magic: bytes) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(magic)) == magic


def _recipe(keys: dict[str, Any], overrides: Iterable[str]) -> RunConfig:
    """Defaults for a model without a recipe; its data come later."""
    nothing = {"datasets": [{"path": "-"}], "dataset_prepared_path": PREPARED}
    try:
        return parse_config(apply_overrides({**nothing, **keys}, overrides), origin="--set")
    except ConfigError as error:
        raise UserError(str(error)) from error


def with_data(cfg: RunConfig, data: Sequence[str], type_: str | None, split: str | None = None) -> RunConfig:
    """`cfg` with other rows, all of which are looked at: prompts where that is what its strategy trains on, else pairs.

    Raises:
        UserError: for a type that there isn't.
    """
    rl = "dpo" if get_strategy(cfg.rl).batch_kind == "unpaired" else cfg.rl
    datasets = [DatasetConfig(path=path, type=type_, split=split) for path in data]
    if problems := [f"--{key}: {message}" for key, message in dataset_problems(datasets[0], rl)]:
        raise UserError("\n".join(problems))
    return cfg.model_copy(update={"rl": rl, "datasets": datasets, "test_datasets": None, "val_set_size": 0.0})
