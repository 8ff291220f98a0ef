"""How Ray is started."""

from __future__ import annotations

from typing import Any


def test_workers_start_with_what_they_need_imported(ray_session: Any) -> None:
    @ray_session.remote(num_cpus=0)
    def imported() -> list[str]:
        import sys

        return [name for name in ("torch", "transformers.trainer", "strategies.trainers", "peft") if name in sys.modules]

    assert ray_session.get(imported.remote()) == ["torch", "transformers.trainer", "strategies.trainers", "peft"]
