"""What nodes would tell, for tests of what follows from it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pipeline.doctor.machine import Gpus, Machine
from pipeline.doctor.node import PACKAGES, TEMPORARY, NodeFacts
from pipeline.doctor.nodes import ProbeReport

__all__ = ["GIB", "answers_of", "node"]

GIB = 1 << 30


def node(name: str, /, **changes: Any) -> NodeFacts:
    """A node on which everything is right."""
    right = NodeFacts(
        name=name,
        address=name.partition(":")[0],
        hostname="host",
        python="3.11.7",
        versions={**dict.fromkeys(PACKAGES, "1.0"), "prefray": None},
        code="abc",
        memory=Machine("CPU", 16 * GIB, 8 * GIB),
        gpus=Gpus(),
        interfaces={"lo": ("127.0.0.1",), "eth0": (name,)},
        gloo_interface=None,
        shared_memory=(8 * GIB, 8 * GIB),
        disks={"output_dir": 100 * GIB, TEMPORARY: 50 * GIB},
        unwritable={},
        unreachable={},
    )
    return replace(right, **changes)


def answers_of(
    *nodes: NodeFacts, blind: dict[str, list[str]] | None = None, silent: dict[str, str] | None = None
) -> ProbeReport:
    """Report of nodes that see each other's files in `output_dir`, but for what `blind` ones see."""
    names = [each.name for each in nodes]
    seen = {name: {"output_dir": (blind or {}).get(name, names)} for name in names}
    return ProbeReport({each.name: each for each in nodes}, silent or {}, seen)
