"""Storage keys for other processes of a Ray: passed by name, since pickles may be written to files."""

from __future__ import annotations

from uuid import uuid4

from cluster.ray_compat import get_value, put_value

__all__ = ["Keys", "hand_over", "take"]

Keys = dict[str, str]
_CACHE: dict[str, Keys] = {}
"""Name -> keys that this process has handed over or taken."""
SPACE = b"prefray-keys"


def hand_over(keys: Keys) -> str:
    """Store keys in the memory of the cluster's head; return the name by which every process of this Ray finds them."""
    # One name per set of keys, however often filesystems are pickled.
    name = next((name for name, existing in _CACHE.items() if existing == keys), None) or uuid4().hex
    _CACHE[name] = keys
    # Also known keys: this process may have joined another Ray since.
    put_value(name, keys, SPACE)
    return name


def take(name: str) -> Keys | None:
    """Return the keys of a name; None in a process of another Ray."""
    if name not in _CACHE and (keys := get_value(name, SPACE)) is not None:
        _CACHE[name] = keys
    return _CACHE.get(name)
