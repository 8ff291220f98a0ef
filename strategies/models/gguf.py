"""GGUF files, converted once to folders that load fast.

transformers needs half a minute to read a GGUF file, mostly for the vocabulary, in every process that loads the config, the
tokenizer or the weights.
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

from strategies.models.location import ModelLocation

__all__ = ["LARGEST", "make_plain", "unpacked"]

Part = Literal["config", "tokenizer", "weights"]

LARGEST = 1 << 30
"""Maximum bytes of a file whose weights are cached: in float32 they take up to eight times as many."""


def unpacked(location: ModelLocation, part: Part) -> ModelLocation:
    """Return the folder with a part of the model; the location itself if it is no GGUF file, or can't be cached.

    Folders are cached in `HF_HOME`. A changed file is converted again.

    Raises:
        OSError, ValueError, KeyError, struct.error: from transformers, for a file that it can't read.
    """
    if not location.is_gguf:
        return location
    file = Path(location.path, location.kwargs["gguf_file"])
    # The float32 copy of a larger file would fill the disk; such a file is read at every load.
    if part == "weights" and file.stat().st_size > LARGEST:
        return location
    with contextlib.suppress(OSError):  # disk full or not writable: load the file itself
        return ModelLocation(location.key, location.given, str(_folder(file, part, location)))
    return location


def _folder(file: Path, part: Part, location: ModelLocation) -> Path:
    from filelock import FileLock

    home = _home(file)
    folder = home / part
    # Before the lock, whose file can't be created in a cache that is read-only.
    if folder.is_dir():
        return folder
    home.mkdir(parents=True, exist_ok=True)
    # A lock of the filesystem is enough: where it fails, another node converts the file too, and loads it directly.
    with FileLock(home / f"{part}.lock"):
        # Again: another process may have converted the file while this one waited.
        if not folder.is_dir():
            # Within the same folder, so the rename is atomic: a folder under the final name is complete.
            partial = Path(tempfile.mkdtemp(prefix=f".{part}-", dir=home))
            try:
                SAVE[part](location, partial)
                # `mkdtemp` keeps other users out, who may share the cache.
                partial.chmod(home.stat().st_mode)
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return folder


def _home(file: Path) -> Path:
    """Return the cache folder of a file, named by its path, size, modification time and transformers' version."""
    import transformers
    from huggingface_hub import constants

    status = file.stat()
    # With the version, since another one may convert the same file differently.
    key = f"{file.resolve()} {status.st_size} {status.st_mtime_ns} {transformers.__version__}"
    return Path(constants.HF_HOME, "prefray", "gguf", hashlib.sha256(os.fsencode(key)).hexdigest()[:20])


def _save_config(location: ModelLocation, folder: Path) -> None:
    from transformers import AutoConfig

    AutoConfig.from_pretrained(location.path, **location.kwargs).save_pretrained(folder)


def _save_tokenizer(location: ModelLocation, folder: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(location.path, **location.kwargs).save_pretrained(folder)


def _save_weights(location: ModelLocation, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    # float32, whatever the run's dtype is, so that one copy serves every run.
    model = AutoModelForCausalLM.from_pretrained(location.path, dtype=torch.float32, **location.kwargs)
    make_plain(model)
    model.save_pretrained(folder)


SAVE: dict[Part, Callable[[ModelLocation, Path], None]] = {
    "config": _save_config,
    "tokenizer": _save_tokenizer,
    "weights": _save_weights,
}


def make_plain(model: Any) -> None:
    """Remove the quantization state of dequantized weights, so that they can be trained and saved."""
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
