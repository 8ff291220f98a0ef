"""Whether workers on several nodes can find each other."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator

from pipeline.doctor.checks import Check
from pipeline.doctor.node import NodeFacts

__all__ = ["check_network"]

VARIABLE = "GLOO_SOCKET_IFNAME"


def check_network(facts: Iterable[NodeFacts]) -> Iterator[Check]:
    """The interface that gloo will take on each node: the one with the node's address, if the environment names no other."""
    nodes = list(facts)
    if len({node.address for node in nodes}) < 2:  # one node, or several on one machine
        return
    problems, taken = [], {}
    for node in nodes:
        interface, problem = _interface(node)
        if problem is not None:
            problems.append(f"{node.name}: {problem}")
        else:
            taken[node.name] = interface
    if problems:
        yield Check("gloo interface", "fail", "; ".join(problems))
    else:
        yield Check("gloo interface", "pass", ", ".join(f"{interface} on {name}" for name, interface in taken.items()))


def _interface(node: NodeFacts) -> tuple[str | None, str | None]:
    """(interface, what is wrong with it)."""
    if node.gloo_interface is not None:
        if node.gloo_interface not in node.interfaces:
            there = ", ".join(node.interfaces)
            return None, f"{VARIABLE}={node.gloo_interface} names none of its interfaces ({there}); set it right, or unset it"
        return node.gloo_interface, None
    try:
        is_loopback = ipaddress.ip_address(node.address).is_loopback
    except ValueError:
        return None, f"the cluster knows it as {node.address!r}; start Ray there with --node-ip-address, or set {VARIABLE}"
    if is_loopback:
        return None, "the cluster knows it by its loopback address; start Ray there with --node-ip-address"
    for interface, addresses in node.interfaces.items():
        if node.address in addresses:
            return interface, None
    return None, f"none of its interfaces has the address that the cluster knows; set {VARIABLE} there"
