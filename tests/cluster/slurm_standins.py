"""Stand-ins for Slurm's commands, for Ray's and for Python, which write down how they were called."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

from tests.waiting import wait_for

__all__ = ["Job"]

STANDINS = {
    "srun": """
node=
while [[ $1 == --* ]]; do case $1 in --nodelist=*) node=${1#*=} ;; esac; shift; done
NODE=$node exec "$@"
""",
    "scontrol": 'if [[ $1 == show ]]; then printf "b\\na\\nc\\n"; else echo "scontrol $*" >> "$LOG"; fi',
    "ray": """
if [[ $1 == health-check ]]; then [[ ${HEAD_FAILS:-} ]] && exit 1; grep -q "^head" "$LOG"; exit; fi
[[ ${HEAD_FAILS:-} ]] && exit 9
trap 'echo "end $NODE" >> "$LOG"; exit 0' TERM
role=worker; [[ " $* " == *" --head "* ]] && role=head
echo "$role $NODE $RAY_AUTH_MODE $RAY_AUTH_TOKEN $*" >> "$LOG"
while true; do sleep 0.05; done
""",
    "python": """
case "$1 ${2:-}" in
    *secrets*) echo token-of-the-job ;;
    *get_node_ip_address*) echo 10.0.0.1 ;;
    "- "*)
        grep -q "ray.nodes()" || exit 5  # the program comes on standard input
        until (($(grep -cE "^(head|worker)" "$LOG") >= $3)); do sleep 0.05; done
        echo "wait for $3 nodes at $2" >> "$LOG"
        ;;
    *)
        recipe=$(printf '%s\\n' "$@" | grep recipe.yaml || true)
        if [[ $recipe ]]; then cp "$recipe" "$LOG.recipe"; fi
        trap 'echo "saved" >> "$LOG"; exit 143' TERM
        echo "run ${*/$recipe/RECIPE} at $RAY_ADDRESS" >> "$LOG"
        if [[ ${STATUS:-} ]]; then exit "$STATUS"; fi
        while true; do sleep 0.05; done
        ;;
esac
""",
}


class Job:
    """A job of three nodes whose script runs on node `a`."""

    def __init__(self, folder: Path, script: str) -> None:
        self.folder, self.script, self.log_file = folder, folder / "job.sh", folder / "log"
        self.process: subprocess.Popen[str] | None = None
        self.script.write_text(script)
        self.log_file.touch()
        (folder / "tmp").mkdir()
        for name, body in STANDINS.items():
            standin = folder / "bin" / name
            standin.parent.mkdir(exist_ok=True)
            standin.write_text(f"#!/usr/bin/env bash\n{body}\n")
            standin.chmod(0o755)

    def start(self, **environment: str) -> subprocess.Popen[str]:
        slurm = {"SLURM_JOB_ID": "70001", "SLURM_JOB_NODELIST": "[a-c]", "SLURMD_NODENAME": "a", "SLURM_CPUS_PER_TASK": "8"}
        path = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "LOG": str(self.log_file),
            "TMPDIR": str(self.folder / "tmp"),
        }
        self.process = subprocess.Popen(
            ["bash", str(self.script)],
            env={**os.environ, **slurm, **path, **environment},
            text=True,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        return self.process

    def end(self) -> None:
        """Leave no process behind, whatever the script has done."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.communicate()

    def run(self, **environment: str) -> tuple[int, str]:
        process = self.start(**environment)
        _, words = process.communicate(timeout=300)
        return process.returncode, words

    def log(self) -> list[str]:
        return self.log_file.read_text().splitlines()

    def wait_for(self, beginning: str) -> None:
        wait_for(lambda: any(line.startswith(beginning) for line in self.log()))
