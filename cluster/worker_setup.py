"""Does what Ray's own `setup_worker.py` does for a Python worker, without importing Ray, which takes a second of every start.

Run as `python worker_setup.py --language=PYTHON --serialized-runtime-env-context=JSON PROGRAM ...`; all else is left to Ray's.
"""

import json
import os
import re
import shlex
import sys

LANGUAGE, CONTEXT = "--language=", "--serialized-runtime-env-context="
KNOWN = {"env_vars", "py_executable"}
"""What of a runtime environment's context may say something here."""
RAYS = "_private/workers/setup_worker.py"


def main(arguments: list[str]) -> None:
    """Become the worker; doesn't return."""
    command = worker_command(arguments)
    if command is None:
        from importlib.util import find_spec

        spec = find_spec("ray")
        assert spec is not None and spec.origin is not None
        command = [sys.executable, os.path.join(os.path.dirname(spec.origin), RAYS), *arguments]
    os.execvp(command[0], command)  # noqa: S606 - as Ray does


def worker_command(arguments: list[str]) -> list[str] | None:
    """The worker's command, for which the environment has been set; None for what is not known here."""
    options = [one for one in arguments if one.startswith((LANGUAGE, CONTEXT))]
    given = {name: one.removeprefix(name) for one in options for name in (LANGUAGE, CONTEXT) if one.startswith(name)}
    if given.get(LANGUAGE) != "PYTHON" or sorted(given) != sorted([LANGUAGE, CONTEXT]) or len(options) != len(given):
        return None
    context = json.loads(given[CONTEXT] or "{}")
    if any(value for name, value in context.items() if name not in KNOWN):
        return None
    for name, value in (context.get("env_vars") or {}).items():
        os.environ[name] = re.sub(r"\$\{[A-Z0-9_]+\}", "", os.path.expandvars(value))
    python = shlex.split(context.get("py_executable") or shlex.quote(sys.executable))
    return [*python, *(one for one in arguments if one not in options)]


if __name__ == "__main__":
    main(sys.argv[1:])
