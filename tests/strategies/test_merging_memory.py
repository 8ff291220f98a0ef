"""A merge needs memory for a shard, not for a model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.strategies.merging import write_adapter

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
MEASURE = """
import json, re, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
from tests.strategies.merging import merge_folder, unmerged

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

base, adapter, tiny_base, tiny_adapter, out, shard = sys.argv[1:]
torch.set_num_threads(1)
merge_folder(Path(tiny_base), Path(tiny_adapter), Path(out + "-tiny"))  # whatever is imported late
before = peak()
plan = merge_folder(Path(base), Path(adapter), Path(out), shard_size=int(shard))
streamed = peak() - before
unmerged(Path(base), Path(adapter)).merge_and_unload()
print(json.dumps({"streamed": streamed, "whole": peak() - before, "model": plan.nbytes}))
"""


def write_base(folder: Path, layers: int) -> None:
    """A model of random weights in one shard per layer, 24 MiB each in float32."""
    sizes = {"hidden_size": 512, "intermediate_size": 3072, "num_attention_heads": 8, "num_key_value_heads": 8}
    config = LlamaConfig(**sizes, num_hidden_layers=layers, vocab_size=1024, tie_word_embeddings=True)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).named_parameters()}
    folder.mkdir()
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, shape in shapes.items():
        part = name.split(".")[2] if "layers" in name else "rest"
        shards.setdefault(f"model-{part}.safetensors", {})[name] = torch.randn(shape) * 0.02
    for file, tensors in shards.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    places = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config.save_pretrained(folder)


@pytest.mark.processes
def test_the_peak_of_memory_is_that_of_a_shard(tmp_path: Path) -> None:
    for name, layers in (("base", 6), ("tiny", 1)):
        write_base(tmp_path / name, layers)
        write_adapter(tmp_path / f"{name}-adapter", AutoModelForCausalLM.from_pretrained(tmp_path / name))
    places = [tmp_path / name for name in ("base", "base-adapter", "tiny", "tiny-adapter", "merged")]
    command = [sys.executable, "-c", MEASURE, *map(str, places), str(24 * MIB)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    found = json.loads(done.stdout.splitlines()[-1])
    print({name: f"{size / MIB:.0f} MiB" for name, size in found.items()})
    assert found["model"] > 128 * MIB
    assert found["streamed"] < 0.5 * found["model"]  # of the 300 MiB of twice as many layers, it takes 27
    assert found["whole"] > 0.8 * found["model"]
