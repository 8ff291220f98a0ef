"""Models in GGUF files, turned once into folders that load in no time.

Reading a GGUF file takes transformers half a minute of Python, most of it for the vocabulary, in every process that wants the
config, the tokenizer or the weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from strategies.locations import ModelLocation

__all__ = ["LARGEST", "make_plain", "unpacked"]

Part = Literal["config", "tokenizer", "weights"]

LARGEST = 1 << 30
"""Bytes of a file whose weights are kept unpacked: in float32 they take up to eight times as many."""


def unpacked(location: ModelLocation, part: Part) -> ModelLocation:
    """Where a part of the model lies as a folder; the location itself where that is no GGUF file, or can't be kept.

    Folders are in `HF_HOME`, beside what comes from the hub. A file that has changed gets another one.

    Raises:
        OSError, ValueError, KeyError, struct.error: as transformers raises them for a file that it can't read.
    """
    if not location.is_gguf:
        return location
    file = Path(location.path, location.kwargs["gguf_file"])
    if part == "weights" and file.stat().st_size > LARGEST:
        return location
    with contextlib.suppress(OSError):  # no room, or nowhere to write: then the file itself is loaded
        return ModelLocation(location.key, location.given, str(_folder(file, part, location)))
    return location


def _folder(file: Path, part: Part, location: ModelLocation) -> Path:
    from filelock import FileLock

    home = _home(file)
    folder = home / part
    if folder.is_dir():
        return folder
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / f"{part}.lock"):
        if not folder.is_dir():
            partial = Path(tempfile.mkdtemp(prefix=f".{part}-", dir=home))
            try:
                SAVE[part](location, partial)
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return folder


def _home(file: Path) -> Path:
    """Named by the file as it is now, and by the version of what reads it."""
    import transformers
    from huggingface_hub import constants

    status = file.stat()
    what = f"{file.resolve()} {status.st_size} {status.st_mtime_ns} {transformers.__version__}"
    return Path(constants.HF_HOME, "prefray", "gguf", hashlib.sha256(os.fsencode(what)).hexdigest()[:20])


def _save_config(location: ModelLocation, folder: Path) -> None:
    from transformers import AutoConfig

    AutoConfig.from_pretrained(location.path, **location.kwargs).save_pretrained(folder)


def _save_tokenizer(location: ModelLocation, folder: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(location.path, **location.kwargs).save_pretrained(folder)


def _save_weights(location: ModelLocation, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(location.path, dtype=torch.float32, **location.kwargs)
    make_plain(model)
    model.save_pretrained(folder)


SAVE: dict[Part, Callable[[ModelLocation, Path], None]] = {
    "config": _save_config,
    "tokenizer": _save_tokenizer,
    "weights": _save_weights,
}


def make_plain(model: Any) -> None:
    """Forget that the weights were quantized on disk: they are plain tensors now, and may be trained and saved."""
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
