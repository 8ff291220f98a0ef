"""How Ray is started."""

from __future__ import annotations

from typing import Any


def test_workers_start_with_what_they_need_imported(ray_session: Any) -> None:
    @ray_session.remote(num_cpus=0)
    def imported() -> list[str]:
        import sys

        return [name for name in ("torch", "transformers.trainer", "strategies.trainers", "peft") if name in sys.modules]

    assert ray_session.get(imported.remote()) == ["torch", "transformers.trainer", "strategies.trainers", "peft"]


def test_a_worker_computes_with_the_threads_of_its_cpus(ray_session: Any) -> None:
    """Ray says how many they are after the worker was forked, with torch loaded."""

    @ray_session.remote(num_cpus=1)
    class Worker:
        def threads(self) -> tuple[int, str | None]:
            import os

            import torch

            from pipeline.session import use_own_threads

            torch.set_num_threads(3)
            use_own_threads()
            return torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")

    threads, said = ray_session.get(Worker.remote().threads.remote())
    assert str(threads) == said
