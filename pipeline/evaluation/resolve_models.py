"""Resolution of the policy and reference to evaluate: from a run, a model or an adapter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import DatasetConfig, RunConfig, parse_config
from pipeline.config.loading import apply_overrides, parse_yaml
from pipeline.config.paths import absolute_paths
from pipeline.config.trust import refuse_code_of_run
from pipeline.data.dataset_keys import dataset_problems
from pipeline.errors import ConfigError, UserError
from pipeline.io.remote_models import check_remote, fetch_models
from pipeline.io.retry import STORAGE_ERRORS
from pipeline.io.storage import Folder, Location, inside, locate, reason, without_scheme
from pipeline.runs.finished import EXPECTED, finished_run, holds_run
from pipeline.runs.folder import CONFIG
from strategies.methods.registry import get_strategy
from strategies.models.location import ADAPTER_CONFIG, is_remote, resolve_model_location
from strategies.models.tokenizer import check_reads_tokens, load_tokenizer

__all__ = ["Subject", "find_subject", "with_data"]

PREPARED = "last_run_prepared"


@dataclass(frozen=True)
class Subject:
    """A policy and its reference, each as a config with that model as its reference, so that the score stage scores both."""

    name: str
    """The user's argument."""
    cfg: RunConfig
    """The run's recipe, or defaults for a model without a run."""
    policy: RunConfig
    reference: RunConfig | None
    """None if the model's starting point is unknown."""
    prepared: str | None = None
    """Fingerprint of the data that the run was trained on."""
    given_reference: str | None = None
    """The user's argument, where the reference isn't what the policy was trained from."""

    @property
    def reference_name(self) -> str | None:
        """Name of the reference to display."""
        if self.reference is None:
            return None
        keys = ("reference_model", "lora_model_dir", "base_model")
        return next(name for key in keys if (name := getattr(self.reference, key)) is not None)

    @property
    def beta(self) -> float:
        """Scale of the run's implicit rewards."""
        return get_strategy(self.cfg.rl).reward_scale(self.cfg)

    @property
    def rewards_need_reference(self) -> bool:
        """Whether the run's rewards are relative to a reference; those of simpo and orpo aren't."""
        strategy = get_strategy(self.cfg.rl)
        return strategy.requires_reference or strategy.batch_kind == "prompt"


def find_subject(
    name: str, reference: str | None = None, overrides: Sequence[str] = (), trust: bool = False, rewards: bool = False
) -> Subject:
    """Resolve the user's RUN or MODEL argument.

    Args:
        name: the output_dir of a finished run, a path or a URI; a model; or an adapter.
        reference: a model or an adapter to compare with; by default the model that the policy was trained from.
        overrides: `key=value` overrides of the recipe.
        trust: allow code that the run's config names.
        rewards: whether the run's reward functions will be called.

    Raises:
        UserError: for a missing or unfinished run, one whose config names code without trust, and for an invalid model.
    """
    path = locate(name)
    if holds_run(path):
        subject = _of_run(name, path, overrides, trust, rewards)
    elif _holds_adapter(path):
        # An adapter without a run: what it names is the base; tokenizer and processor beside it were saved in training.
        cfg = absolute_paths(_default_recipe({"base_model": _base_of(path), **_tokenizer_of(path)}, overrides))
        subject = Subject(name, cfg, _scoring_config(cfg, lora_model_dir=str(path), adapter="lora"), _scoring_config(cfg))
    else:
        _check_model(name, "RUN|MODEL")
        cfg = absolute_paths(_default_recipe({"base_model": name}, overrides))
        subject = Subject(name, cfg, _scoring_config(cfg), None)
    fetch_models(*filter(None, (subject.policy, subject.reference if reference is None else None)))
    if reference is None:
        return subject
    reference_cfg = _model(subject.cfg, reference, "--reference")
    fetch_models(reference_cfg)
    # Log-ratios compare token by token, so ids must mean the same to both.
    _check_tokenizer(subject.policy, reference_cfg)
    return Subject(name, subject.cfg, subject.policy, reference_cfg, subject.prepared, reference)


def _of_run(name: str, path: Location, overrides: Sequence[str], trust: bool, rewards: bool) -> Subject:
    folder, state = finished_run(name, path)
    saved = parse_yaml(folder.storage.read(CONFIG) or "", str(folder.config))
    if not trust:
        # On the plain values: validation would already load the plugins.
        refuse_code_of_run(name, saved, overrides, rewards)
    values = apply_overrides(saved, overrides)
    cfg = absolute_paths(parse_config(values, origin=str(folder.config)).model_copy(update={"tune": None}))
    model = str(folder.model)
    if _holds_adapter(folder.model):
        # reference_model=None: otherwise that model, not the adapter's base, would be scored as the policy.
        policy = _scoring_config(cfg, lora_model_dir=model, adapter=cfg.adapter or "lora", reference_model=None)
    else:
        policy = _scoring_config(cfg, reference_model=model)
    return Subject(name, cfg, policy, _scoring_config(cfg), state.get("prepared"))


def _scoring_config(cfg: RunConfig, **keys: Any) -> RunConfig:
    """Return `cfg` as a dpo recipe with a cached reference: the score stage doesn't depend on the method."""
    overrides_for_scoring = {"rl": "dpo", "reference": "cached", "trl": None, "dpo_generate_during_eval": False, "tune": None}
    return cfg.model_copy(update={**overrides_for_scoring, **keys})


def _model(cfg: RunConfig, name: str, what: str) -> RunConfig:
    """Return a config whose reference is a model or an adapter."""
    path = locate(name)
    if _holds_adapter(path):
        keys = {"base_model": _base_of(path), "lora_model_dir": str(path), "adapter": "lora"}
        return _scoring_config(absolute_paths(cfg.model_copy(update={**keys, "reference_model": None})))
    _check_model(name, what)
    return _scoring_config(absolute_paths(cfg.model_copy(update={"reference_model": name})))


def _check_tokenizer(policy: RunConfig, reference: RunConfig) -> None:
    """Raise UserError for a reference whose tokenizer differs from the policy's."""
    try:
        check_reads_tokens(policy, load_tokenizer(policy), reference.reference_model or reference.base_model, "--reference")
    except ValueError as error:
        raise UserError(str(error)) from error


def _holds_adapter(location: Location) -> bool:
    return ADAPTER_CONFIG in _names(location)


def _names(location: Location) -> list[str]:
    """Return the names in a folder; none where there is no folder. Raises UserError when it can't be read."""
    if isinstance(location, Path) and not location.is_dir():
        return []
    try:
        return Folder(location).names()
    except STORAGE_ERRORS as error:
        raise UserError(f"{str(location)!r} can't be read: {reason(error)}") from error


def _base_of(adapter: Location) -> str:
    try:
        config = Folder(adapter).read_json(ADAPTER_CONFIG)
    except STORAGE_ERRORS as error:
        raise UserError(f"{inside(adapter, ADAPTER_CONFIG)} can't be read: {reason(error)}") from error
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not base:
        raise UserError(f"{inside(adapter, ADAPTER_CONFIG)} names no base model (base_model_name_or_path); write it there")
    return base


def _tokenizer_of(adapter: Location) -> dict[str, str]:
    """Return the tokenizer saved beside an adapter, which has the chat template and the tokens of its training."""
    return {"tokenizer_config": str(adapter)} if "tokenizer_config.json" in _names(adapter) else {}


def _check_model(name: str, what: str) -> None:
    """Raise UserError for a path or URI that is no model; hub ids are checked when they are loaded."""
    if is_remote(name):
        check_remote(what, name)
        return
    try:
        location = resolve_model_location(without_scheme(name), what)
    except ValueError as error:
        raise UserError(f"{error}; {EXPECTED}") from error
    folder = Path(location.path)
    if location.is_gguf:
        if not _begins_with(folder / location.kwargs["gguf_file"], b"GGUF"):
            raise UserError(f"{name!r} is no GGUF file; {EXPECTED}")
    elif not folder.exists():
        if "/" not in name:
            raise UserError(f"no such folder: {name!r}; {EXPECTED}")
    elif not (folder / "config.json").is_file():
        raise UserError(
            f"{name!r} is no run, model or adapter (no run.json, config.json or {ADAPTER_CONFIG} in it); {EXPECTED}"
        )
    elif not _has_weights(folder):
        raise UserError(f"{name!r} holds a model's config and no weights (*.safetensors or *.bin); {EXPECTED}")


def _has_weights(folder: Path) -> bool:
    return any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir())


def _begins_with(file: Path, magic: bytes) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(magic)) == magic


def _default_recipe(keys: dict[str, Any], overrides: Iterable[str]) -> RunConfig:
    """Return default keys for a model without a recipe, with placeholder data that `with_data` replaces."""
    placeholders = {"datasets": [{"path": "-"}], "dataset_prepared_path": PREPARED}
    try:
        return parse_config(apply_overrides({**placeholders, **keys}, overrides), origin="--set")
    except ConfigError as error:
        raise UserError(str(error)) from error


def with_data(cfg: RunConfig, data: Sequence[str], type_: str | None, split: str | None = None) -> RunConfig:
    """Return `cfg` with other data, all of it evaluated: prompts if its strategy trains on prompts, else pairs.

    Raises:
        UserError: for an unknown dataset type.
    """
    # kto's evaluation needs pairs, as accuracies and margins compare two answers.
    rl = "dpo" if get_strategy(cfg.rl).batch_kind == "unpaired" else cfg.rl
    datasets = [DatasetConfig(path=path, type=type_, split=split) for path in data]
    # All entries have the same type and split, so the first one's problems are those of all.
    if problems := [f"--{key}: {message}" for key, message in dataset_problems(datasets[0], rl)]:
        raise UserError("\n".join(problems))
    return cfg.model_copy(update={"rl": rl, "datasets": datasets, "test_datasets": None, "val_set_size": 0.0})
