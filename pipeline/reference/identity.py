"""Which weights the reference has: a hash of exactly what decides them."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.reference.hashing import file_digest
from strategies.gguf import unpacked
from strategies.locations import ADAPTER_CONFIG, ModelLocation, resolve_model_location

__all__ = ["base_fingerprint", "pin_revision", "reference_identity", "reference_key"]

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# In the order in which `from_pretrained` looks for them; an index names the files that belong to it.
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.index.json")
SAME_WEIGHTS = ("attn_implementation", "device_map", "low_cpu_mem_usage", "max_memory")
"""Arguments of `from_pretrained` that say how the model computes or where it lies, not what it is."""


def reference_key(cfg: Any) -> str:
    """The config key that names the reference's weights."""
    return "base_model" if cfg.reference_model is None else "reference_model"


def reference_identity(cfg: Any) -> dict[str, Any]:
    """What decides the reference's weights, as a part of the scores' inputs.

    The reference is `reference_model`; else `base_model`, with the adapter of `lora_model_dir` where one is continued. A new
    adapter changes nothing: the model without it is the reference.

    Raises:
        UserError: where no model lies at the given place, or one of its files can't be read.
    """
    key = reference_key(cfg)
    is_base = key == "base_model"
    arguments = {name: value for name, value in (cfg.overrides_of_model_kwargs or {}).items() if name not in SAME_WEIGHTS}
    try:
        location = resolve_model_location(getattr(cfg, key), key)
        identity: dict[str, Any] = {"model": _model(location, _revision(cfg), arguments, cfg.trust_remote_code)}
        if is_base and cfg.lora_model_dir is not None:
            adapter = resolve_model_location(cfg.lora_model_dir, "lora_model_dir")
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
    identity |= {name: value for name, value in (("config_overrides", overrides), ("arguments", arguments)) if value}
    if cfg.load_in_4bit or cfg.load_in_8bit:
        identity["quantization"] = {"bits": 4 if cfg.load_in_4bit else 8, **(cfg.bnb_config_kwargs or {})}
    if (size := _grown_to(cfg, location)) is not None:
        identity["grown_embeddings"] = {"tokens": size, "seed": cfg.seed, "x32": bool(cfg.resize_token_embeddings_to_32x)}
    return json.loads(json.dumps(identity, default=str))


def base_fingerprint(cfg: Any) -> str:
    """Hash of what decides the weights of `base_model` as training starts from it: 20 hex digits. Errors as above."""
    identity = reference_identity(cfg.model_copy(update={"reference_model": None}))
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]


def pin_revision(cfg: Any, identity: dict[str, Any]) -> Any:
    """`cfg` with the hub commit that the identity names, so that what an actor loads is what was named."""
    commit = identity["model"].get("commit")
    if commit is None:
        return cfg
    return cfg.model_copy(update={"overrides_of_model_kwargs": {**(cfg.overrides_of_model_kwargs or {}), "revision": commit}})


def _revision(cfg: Any) -> str | None:
    given = (cfg.overrides_of_model_kwargs or {}).get("revision")
    return given or (cfg.revision_of_model if cfg.reference_model is None else None)


def _model(location: ModelLocation, revision: str | None, arguments: dict[str, Any], code: bool) -> dict[str, Any]:
    folder = Path(location.path)
    if location.is_gguf:
        return {"gguf": file_digest(folder / location.kwargs["gguf_file"])}
    if not folder.is_dir():
        return {"hub": location.path, "commit": _commit(location, revision, "config.json")}
    files = [folder / "config.json", *_weight_files(folder / arguments.get("subfolder", ""), arguments)]
    if (folder / ADAPTER_CONFIG).exists():  # transformers loads such a folder's base, then the adapter
        files += _adapter_files(folder)
    if code:
        files += sorted(folder.glob("*.py"))
    found = {file.relative_to(folder).as_posix(): file_digest(file) for file in files if file.exists()}
    if not found:
        raise ValueError(f"{location.key}: no model could be loaded from {location.given!r}: it holds no config and no weights")
    return {"files": found}


def _weight_files(folder: Path, arguments: dict[str, Any]) -> list[Path]:
    """The files that `from_pretrained` would read; where an argument makes it look elsewhere, all that could be meant."""
    first = next((folder / name for name in WEIGHT_FILES if (folder / name).exists()), None)
    if first is None or arguments.get("variant") or "use_safetensors" in arguments:
        return sorted(file for pattern in OTHER_WEIGHTS for file in folder.glob(pattern))
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
    """The commit that a hub id stands for here and now: of the local copy where the hub can't be asked.

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


def _grown_to(cfg: Any, location: ModelLocation) -> int | None:
    """Tokens of the tokenizer where the embeddings grow to them, for their new rows depend on the seed; else None."""
    from transformers import AutoConfig

    from strategies.tokenizer import load_tokenizer

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
            where = f"{location.key}: no model could be loaded from {location.given!r}"
            raise UserError(f"{where}: {error}") from error
        size = config.get_text_config().vocab_size
    tokens = len(load_tokenizer(cfg))
    return tokens if tokens > size else None
