"""Replacement for Ray's `setup_worker.py` for Python workers that doesn't import Ray, which takes a second of every start.

Run as `python worker_setup.py --language=PYTHON --serialized-runtime-env-context=JSON PROGRAM ...`. Other runtime
environments are left to Ray's program.
"""

import json
import os
import re
import shlex
import sys

LANGUAGE, CONTEXT = "--language=", "--serialized-runtime-env-context="
KNOWN = {"env_vars", "py_executable"}
"""Fields of a runtime environment's context that are supported here."""
RAYS = "_private/workers/setup_worker.py"


def main(arguments: list[str]) -> None:
    """Execute the worker's program in place of this one; doesn't return."""
    command = worker_command(arguments)
    if command is None:
        from importlib.util import find_spec

        spec = find_spec("ray")
        assert spec is not None and spec.origin is not None
        command = [sys.executable, os.path.join(os.path.dirname(spec.origin), RAYS), *arguments]
    os.execvp(command[0], command)  # noqa: S606 - as Ray does


def worker_command(arguments: list[str]) -> list[str] | None:
    """Set the environment and return the worker's command; None for a runtime environment that isn't supported here."""
    options = [item for item in arguments if item.startswith((LANGUAGE, CONTEXT))]
    flags = {name: item.removeprefix(name) for item in options for name in (LANGUAGE, CONTEXT) if item.startswith(name)}
    if flags.get(LANGUAGE) != "PYTHON" or sorted(flags) != sorted([LANGUAGE, CONTEXT]) or len(options) != len(flags):
        return None
    context = json.loads(flags[CONTEXT] or "{}")
    # Containers, command prefixes and the like need Ray's program.
    if any(value for name, value in context.items() if name not in KNOWN):
        return None
    for name, value in (context.get("env_vars") or {}).items():
        # As Ray's `update_envs`: names without a value become empty.
        os.environ[name] = re.sub(r"\$\{[A-Z0-9_]+\}", "", os.path.expandvars(value))
    # A command with arguments, which Ray passes to a shell.
    python = shlex.split(context.get("py_executable") or shlex.quote(sys.executable))
    return [*python, *(item for item in arguments if item not in options)]


if __name__ == "__main__":
    main(sys.argv[1:])
