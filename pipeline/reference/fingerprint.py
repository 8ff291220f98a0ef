"""Fingerprint of the reference: a hash of everything that determines its weights."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.io.digests import file_digest
from pipeline.io.remote_models import bring_weights
from pipeline.secrets import is_secret_key
from strategies.config import StrategyConfig
from strategies.models.gguf import unpacked
from strategies.models.location import ADAPTER_CONFIG, ModelLocation, resolve_model_location
from strategies.models.tokenizer import shared_tokenizer

__all__ = ["base_fingerprint", "pin_base", "pin_revision", "reference_identity", "reference_key"]

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# In the order in which `from_pretrained` looks for them; an index names the files that belong to it.
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.index.json")
SAME_WEIGHTS = ("attn_implementation", "device_map", "low_cpu_mem_usage", "max_memory")
"""Arguments of `from_pretrained` that affect computation or placement, not weights."""


def reference_key(cfg: StrategyConfig) -> str:
    """Return the config key that names the reference's weights."""
    return "base_model" if cfg.reference_model is None else "reference_model"


def reference_identity(cfg: StrategyConfig) -> dict[str, Any]:
    """Return everything that determines the reference's weights, as a part of the scores' inputs.

    The reference is `reference_model`; else `base_model`, with the adapter of `lora_model_dir` where one is continued. A new
    adapter changes nothing: the model without it is the reference.

    Raises:
        UserError: when there is no model at the configured path, or one of its files can't be read.
    """
    key = reference_key(cfg)
    is_base = key == "base_model"
    # A copy without weights has other files, and so another identity.
    bring_weights(cfg, ("base_model", "lora_model_dir") if is_base else ("reference_model",))
    kwargs = cfg.overrides_of_model_kwargs or {}
    # Secrets too are left out: the identity is written to the manifest.
    arguments = {name: value for name, value in kwargs.items() if name not in SAME_WEIGHTS and not is_secret_key(name)}
    try:
        location = resolve_model_location(getattr(cfg, key), key)
        identity: dict[str, Any] = {"model": _model(location, _revision(cfg), arguments, cfg.trust_remote_code)}
        if is_base and cfg.lora_model_dir is not None:
            adapter = resolve_model_location(cfg.lora_model_dir, "lora_model_dir")
            # Whether PEFT casts the adapter's weights to float32 changes their products.
            autocast = cfg.peft_autocast_adapter_dtype is not False
            identity["adapter"] = {**_adapter(adapter), "float32": autocast}
        if is_base and cfg.base_model_config is not None:
            other = resolve_model_location(cfg.base_model_config, "base_model_config")
            identity["config"] = _config(other)
    except OSError as error:
        raise UserError(f"{key}: {error.filename or getattr(cfg, key)!r} can't be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(str(error)) from error
    overrides = cfg.overrides_of_model_config if is_base else None
    # Only if set, so that a new key leaves existing fingerprints unchanged.
    identity |= {name: value for name, value in (("config_overrides", overrides), ("arguments", arguments)) if value}
    if cfg.load_in_4bit or cfg.load_in_8bit:
        identity["quantization"] = {"bits": 4 if cfg.load_in_4bit else 8, **(cfg.bnb_config_kwargs or {})}
    if (size := _grown_to(cfg, location)) is not None:
        identity["grown_embeddings"] = {"tokens": size, "seed": cfg.seed, "x32": bool(cfg.resize_token_embeddings_to_32x)}
    # As it is read back from a manifest, with which `open_scores` compares it.
    return json.loads(json.dumps(identity, default=str))


def base_fingerprint(cfg: StrategyConfig) -> str:
    """Return the hash of `base_model`'s initial weights: 20 hex digits. Raises as `reference_identity`."""
    # Without `reference_model`, the identity is that of `base_model`.
    identity = reference_identity(cfg.model_copy(update={"reference_model": None}))
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]


def pin_revision(cfg: StrategyConfig, identity: dict[str, Any]) -> Any:
    """Return `cfg` pinned to the hub commit of the identity, so that actors load exactly that model."""
    # Without a commit the model is local, and its files are hashed.
    commit = identity["model"].get("commit")
    if commit is None:
        return cfg
    return cfg.model_copy(update={"overrides_of_model_kwargs": {**(cfg.overrides_of_model_kwargs or {}), "revision": commit}})


def pin_base(cfg: StrategyConfig) -> Any:
    """Return `cfg` pinned to the current hub commit of `base_model`, so that scoring and all workers load the same one.

    Raises:
        UserError: when the hub is unreachable and there is no local copy.
    """
    try:
        location = resolve_model_location(cfg.base_model, "base_model")
        # Local weights are hashed, and an explicit revision stays as the user set it.
        if location.is_gguf or Path(location.path).exists() or (cfg.overrides_of_model_kwargs or {}).get("revision"):
            return cfg
        return cfg.model_copy(update={"revision_of_model": _commit(location, cfg.revision_of_model, "config.json")})
    except ValueError as error:
        raise UserError(str(error)) from error


def _revision(cfg: StrategyConfig) -> str | None:
    revision = (cfg.overrides_of_model_kwargs or {}).get("revision")
    return revision or (cfg.revision_of_model if cfg.reference_model is None else None)


def _model(location: ModelLocation, revision: str | None, arguments: dict[str, Any], code: bool) -> dict[str, Any]:
    folder = Path(location.path)
    if location.is_gguf:
        return {"gguf": file_digest(folder / location.kwargs["gguf_file"])}
    # A repository's files are immutable within a commit, so they needn't be downloaded and hashed.
    if not folder.is_dir():
        return {"hub": location.path, "commit": _commit(location, revision, "config.json")}
    files = [folder / "config.json", *_weight_files(folder / arguments.get("subfolder", ""), arguments)]
    if (folder / ADAPTER_CONFIG).exists():  # transformers loads such a folder's base, then the adapter
        files += _adapter_files(folder)
    if code:
        # With trust_remote_code, these files are the model.
        files += sorted(folder.glob("*.py"))
    digests = {file.relative_to(folder).as_posix(): file_digest(file) for file in files if file.exists()}
    if (folder / ADAPTER_CONFIG).exists() and (base := _base_of(folder, location.key)) is not None:
        return {"files": digests, "base": _model(base, None, {}, code)}
    if not digests:
        raise ValueError(f"{location.key}: no model could be loaded from {location.given!r}: it holds no config and no weights")
    return {"files": digests}


def _base_of(adapter: Path, key: str) -> ModelLocation | None:
    """Return the base model named by an adapter's folder, which transformers loads for that folder; None if it names none."""
    base_name = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    return resolve_model_location(base_name, key) if base_name else None


def _weight_files(folder: Path, arguments: dict[str, Any]) -> list[Path]:
    """Return the files that `from_pretrained` would read, or all weight files if an argument changes its choice."""
    first = next((folder / name for name in WEIGHT_FILES if (folder / name).exists()), None)
    # Rather a hash of too many files than of the wrong one.
    if first is None or arguments.get("variant") or "use_safetensors" in arguments:
        return sorted(file for pattern in OTHER_WEIGHTS for file in folder.glob(pattern))
    # Not an index: the one file holds all weights.
    if first.suffix != ".json":
        return [first]
    shards = json.loads(first.read_text())["weight_map"].values()
    return [first, *(folder / name for name in sorted(set(shards)))]


def _adapter(location: ModelLocation) -> dict[str, Any]:
    folder = Path(location.path)
    if not folder.is_dir():
        return {"hub": location.path, "commit": _commit(location, None, ADAPTER_CONFIG)}
    return {"files": {file.name: file_digest(file) for file in _adapter_files(folder)}}


def _adapter_files(folder: Path) -> list[Path]:
    return [file for name in (ADAPTER_CONFIG, *ADAPTER_FILES) if (file := folder / name).exists()]


def _config(location: ModelLocation) -> str:
    path = Path(location.path)
    if path.is_dir():
        return file_digest(path / "config.json")
    return file_digest(path) if path.is_file() else _commit(location, None, "config.json")


def _commit(location: ModelLocation, revision: str | None, name: str) -> str:
    """Return the current commit of a hub id, or that of the local copy if the hub is unreachable.

    Raises:
        ValueError: when there is neither.
    """
    from transformers.utils import cached_file, extract_commit_hash

    try:
        file = cached_file(location.path, name, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(f"{location.key}: no model could be loaded from {location.given!r}: {error}") from error
    commit = extract_commit_hash(file, None)
    assert commit is not None, file
    return commit


def _grown_to(cfg: StrategyConfig, location: ModelLocation) -> int | None:
    """Return the tokenizer's size if the embeddings are resized to it (new rows depend on the seed), else None."""
    from transformers import AutoConfig

    overrides = (cfg.overrides_of_model_config or {}) if location.key == "base_model" else {}
    if "vocab_size" in overrides:
        size = overrides["vocab_size"]
    else:
        revision = {"revision": revision} if (revision := _revision(cfg)) and not Path(location.path).is_dir() else {}
        try:
            source = unpacked(location, "config")
            kwargs = {"trust_remote_code": cfg.trust_remote_code, **source.kwargs, **revision}
            config = AutoConfig.from_pretrained(source.path, **kwargs)
        except (OSError, ValueError, KeyError, struct.error) as error:  # the last for a file that is no GGUF
            prefix = f"{location.key}: no model could be loaded from {location.given!r}"
            raise UserError(f"{prefix}: {error}") from error
        size = config.get_text_config().vocab_size
    tokens = len(shared_tokenizer(cfg))
    return tokens if tokens > size else None
