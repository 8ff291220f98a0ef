"""Models, tokenizers and adapters: locating, loading, sharding and saving them.

location.py         a folder, a hub id, a file of a package, the copy of a URI
config.py           a model's config, read without its weights
loading.py          a model with its adapter
adapter_start.py    initialisation of new adapters
gguf.py             GGUF files converted to folders that transformers loads
tokenizer.py        a tokenizer with its chat template (chat_templates.py)
processor.py        how a model takes pictures
precision.py        whether this machine computes in bf16
sharding.py         set-up of a process for DeepSpeed and FSDP2
gather_weights.py   full weights from shards
saving.py           the final model and its card
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from strategies.lazy import lazy_names

if TYPE_CHECKING:
    from strategies.models.loading import check_adapter, load_model
    from strategies.models.precision import computes_in_bf16, resolve_bf16
    from strategies.models.processor import find_processor, load_processor
    from strategies.models.saving import save_final
    from strategies.models.sharding import find_problems, zero3_init_context
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "strategies.models.loading": "check_adapter load_model",
            "strategies.models.precision": "computes_in_bf16 resolve_bf16",
            "strategies.models.processor": "find_processor load_processor",
            "strategies.models.saving": "save_final",
            "strategies.models.sharding": "find_problems zero3_init_context",
        },
    )

__all__ = [
    "check_adapter",
    "computes_in_bf16",
    "find_problems",
    "find_processor",
    "load_model",
    "load_processor",
    "resolve_bf16",
    "save_final",
    "zero3_init_context",
]
