"""What a node tells of itself: this one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import ray
import torch
import trl

from cluster.config import RayConfig
from pipeline.doctor.node import CACHE, ProbeRequest, Resource, code_digest, inspect_node, list_probes, remove_probes
from pipeline.doctor.reachability import reach
from pipeline.io.storage import Folder
from tests.s3 import Bucket


def test_what_this_machine_is(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    things = (Resource("base_model", str(there), "model"), Resource("datasets.0", str(tmp_path / "none"), "data"))
    probe = ProbeRequest("run", {"output_dir": Folder(tmp_path / "new" / "run")}, things)
    facts = inspect_node(probe, "here", "127.0.0.1", gpus=0)
    assert facts.versions["torch"] == torch.__version__ and facts.versions["trl"] == trl.__version__
    assert facts.versions["ray"] == ray.__version__
    assert facts.code == code_digest() and len(facts.code) == 12
    assert "127.0.0.1" in facts.interfaces["lo"]
    assert 0 < facts.memory.free <= facts.memory.total
    assert "output_dir" in facts.disks
    assert facts.disks["output_dir"] == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.05)
    assert facts.unwritable == {}
    assert facts.unreachable == {"datasets.0": f"no such file or folder: {tmp_path / 'none'}"}
    assert list_probes(probe) == {"output_dir": ["here"]}
    assert list_probes(ProbeRequest("other", probe.folders)) == {"output_dir": []}
    (tmp_path / "new" / "run" / ".prefray-probe-run-there").touch()  # seen, and empty: it can't be read
    assert list_probes(probe) == {"output_dir": ["here"]}
    remove_probes(probe)
    assert not (tmp_path / "new" / "run").exists()


def test_a_folder_that_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    probe = ProbeRequest("run", {"output_dir": Folder(tmp_path / "file" / "run")})
    facts = inspect_node(probe, "here", "127.0.0.1", gpus=0)
    assert list(facts.unwritable) == ["output_dir"] and "Not a directory" in facts.unwritable["output_dir"]
    assert list_probes(probe) == {"output_dir": []}


def test_a_cache_that_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder, problems in (("new", {}), ("file/cache", {CACHE: "Not a directory"})):
        facts = inspect_node(ProbeRequest("run", ray=RayConfig(cache_dir=str(tmp_path / folder))), "here", "127.0.0.1", gpus=0)
        assert facts.unwritable == problems and facts.disks[CACHE] > 0


def test_what_was_in_a_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    probe = ProbeRequest("run", {"output_dir": Folder(tmp_path)})
    inspect_node(probe, "here", "127.0.0.1", gpus=0)
    assert len(os.listdir(tmp_path)) == 2
    remove_probes(probe)
    assert os.listdir(tmp_path) == ["mine"]


def test_a_gpu_that_torch_does_not_see(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there are GPUs here")
    facts = inspect_node(ProbeRequest("run"), "here", "127.0.0.1", gpus=1)
    assert facts.gpus.found == () and str(facts.gpus.problem).startswith("torch ")


def test_storage_of_objects(s3: Bucket) -> None:
    probe = ProbeRequest("run", {"output_dir": Folder(s3.uri("new/run")).carried()})
    assert inspect_node(probe, "here", "127.0.0.1", gpus=0).unwritable == {}
    assert list_probes(probe) == {"output_dir": ["here"]}
    assert reach(s3.uri("new/run/.prefray-probe-run-here"), "data") is None
    assert reach(s3.uri("none.jsonl"), "data") == "there is nothing at this URI"
    remove_probes(probe)
    assert not s3.objects()


def test_what_can_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    for value in ("a.jsonl", str(tmp_path / "*.jsonl"), f"file://{tmp_path}/a.jsonl"):
        assert reach(value, "data") is None, value
    assert reach("b.jsonl", "data") == f"no such file or folder: {tmp_path / 'b.jsonl'}"
    assert (
        reach("/nowhere/model", "model")
        == "no such folder: '/nowhere/model'; give a folder, a hub id (owner/name), or a .gguf file"
    )
    assert "which is not installed" in str(reach("pkg://no_such_package/x.gguf", "model"))


def test_the_hub_is_asked_once_nothing_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert "it isn't in the hub's cache, and the hub doesn't give it" in str(reach("no-such-owner/no-such-model", "model"))
    assert "it isn't in the hub's cache, and the hub doesn't give it" in str(reach("no-such-owner/no-such-data", "data"))
