"""The node's cache: filled once, whole or not at all, never larger than allowed, and nothing goes that a process uses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.io.cache import CACHE_VARIABLE, Item, NodeCache
from tests.waiting import wait_for

ROOT = Path(__file__).parents[2]
PROCESS = """
import sys, time
from pathlib import Path
from pipeline.io.cache import Item, NodeCache
root, key, size, seconds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])

def fill(folder):
    with open(root / "filled.log", "a") as log:
        log.write(f"{key}\\n")
    (folder / "rows").write_bytes(b"x" * (size // 2))
    time.sleep(seconds)
    (folder / "rows").write_bytes(b"x" * size)

cache = NodeCache(root, 1_000_000)
print((cache.get(Item(key, f"the rows of {key}", lambda: size, fill)) / "rows").stat().st_size, flush=True)
sys.stdin.readline()
"""
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """`start(key, size, seconds)`: a process that gets an entry, says its size, and uses it until it is told to end."""
    processes = []

    def run(key: str, size: int = 400_000, seconds: float = 0) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", PROCESS, str(tmp_path), key, str(size), str(seconds)]
        process = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mount)], capture_output=True, check=False)
    if made.returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def item(key: str, size: int, written: int | None = None) -> Item:
    written = size if written is None else written
    return Item(key, f"the rows of {key}", lambda: size, lambda folder: (folder / "rows").write_bytes(b"x" * written) and None)


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def end(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def entries(root: Path) -> list[str]:
    return sorted(folder.name for folder in root.iterdir() if folder.is_dir())


def test_processes_that_want_it_at_once_fill_it_once(start: Start, tmp_path: Path) -> None:
    processes = [start("rows", seconds=0.5) for _ in range(3)]
    assert [said(process) for process in processes] == ["400000"] * 3
    assert (tmp_path / "filled.log").read_text() == "rows\n"


def test_what_was_used_least_recently_goes_and_what_is_in_use_stays(start: Start, tmp_path: Path) -> None:
    for key in ("a", "b", "a"):  # `a` was used again
        end_after = start(key)
        assert said(end_after) == "400000"
        end(end_after)
    held = start("c")
    assert said(held) == "400000"
    assert entries(tmp_path) == ["a", "c"]
    cache = NodeCache(tmp_path, 1_000_000)
    with pytest.raises(
        UserError, match=r"ray.cache_size: the rows of d take about 0.7MB .* beside 0.4MB that are in use.*1.1MB"
    ):
        cache.get(item("d", 700_000))
    assert entries(tmp_path) == ["c"]
    end(held)  # a killed process uses nothing
    assert (cache.get(item("d", 700_000)) / "rows").stat().st_size == 700_000
    assert entries(tmp_path) == ["d"]


@pytest.mark.parametrize("harm", ["cut", "changed", "missing", "unlisted"])
def test_a_damaged_entry_is_fetched_again(start: Start, tmp_path: Path, harm: str) -> None:
    user = start("rows")  # uses the damaged one on, which doesn't keep others from their own
    assert said(user) == "400000"
    file = tmp_path / "rows" / "rows"
    if harm == "cut":
        os.truncate(file, 1000)
    elif harm == "changed":
        file.write_bytes(b"y" * 400_000)
    elif harm == "missing":
        file.unlink()
    else:
        (tmp_path / "rows" / ".prefray.json").write_text("{")
    folder = NodeCache(tmp_path, 1_000_000).get(item("rows", 400_000))
    assert (folder / "rows").read_bytes() == b"x" * 400_000
    assert entries(tmp_path) == ["rows"]


@pytest.mark.parametrize("then", ["rows", "others"])
def test_a_process_killed_while_it_fills_leaves_nothing(start: Start, tmp_path: Path, then: str) -> None:
    killed = start("rows", seconds=60)
    wait_for(lambda: any(tmp_path.glob("rows.*.partial/rows")))
    end(killed)
    (tmp_path / "of.somebody.partial").touch()
    NodeCache(tmp_path, 1_000_000).get(item(then, 900_000))  # also its reserved bytes are free again
    assert entries(tmp_path) == [then] and (tmp_path / "of.somebody.partial").exists()


def test_room_is_reserved_for_what_is_being_filled(start: Start, tmp_path: Path) -> None:
    start("rows", 700_000, seconds=60)
    wait_for(lambda: any(tmp_path.glob("rows.*.partial/rows")))
    with pytest.raises(UserError, match="beside 0.7MB that are in use"):
        NodeCache(tmp_path, 1_000_000).get(item("others", 400_000))


def test_a_disk_that_fills_up(small_disk: Path) -> None:
    cache = NodeCache(small_disk)
    with pytest.raises(
        UserError, match=r"ray.cache_dir: the rows of a take about 8.0MB .* its disk has 4.\dMB free.* set ray.c"
    ):
        cache.get(item("a", 8_000_000))
    with pytest.raises(
        UserError, match=r"ray.cache_dir: .*: No space left on device; the rows of a take about 3.0MB of it; set"
    ):
        cache.get(item("a", 3_000_000, written=8_000_000))
    assert entries(small_disk) == []
    assert (cache.get(item("a", 3_000_000)) / "rows").exists()


def test_a_cache_that_can_not_be_written(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    cache = NodeCache(small_disk)
    with pytest.raises(
        UserError, match="ray.cache_dir: .*can't be written: Read-only file system; the rows of a take about 3.0MB of it; set"
    ):
        cache.get(item("a", 3_000_000))
    for check in (cache.check, lambda: cache.check_room([item("a", 3_000_000)])):
        with pytest.raises(
            UserError, match=r"ray.cache_dir: .*can't be written: Read-only file system; set ray.cache_dir \(or"
        ):
            check()


def test_one_message_has_the_size_of_all_that_a_process_needs(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 1_000_000)
    cache.get(item("a", 300_000))
    asked = [item("a", 300_000), item("b", 400_000), item("c", 400_000)]
    with pytest.raises(
        UserError, match=r"ray.cache_size: the rows of b, the rows of c take about 0.8MB .* beside 0.3MB .*; set 1.1MB or more"
    ):
        cache.check_room(asked)
    assert entries(tmp_path) == ["a"]
    cache.check_room(asked[:2])
    for one in asked[:2]:
        cache.get(one)
    cache.check_room([item("a", 10**9), item("b", 10**9)])  # they are there


def test_where_the_cache_of_a_node_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cluster.config import RayConfig

    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    assert NodeCache.of(RayConfig()) == NodeCache(tmp_path)
    assert NodeCache.of(RayConfig(cache_dir="/fast", cache_size="1.5tb")) == NodeCache(Path("/fast"), 1_500_000_000_000)
    monkeypatch.delenv(CACHE_VARIABLE)
    assert NodeCache.of(RayConfig()).root == Path.home() / ".cache" / "prefray"
    # Nothing may be made in the folder that this process happens to run in.
    for relative in ("cache", "~nobody-of-this-name/cache"):
        monkeypatch.setenv(CACHE_VARIABLE, relative)
        cache = NodeCache.of(RayConfig())
        assert cache.problem() == f"'{relative}' is no absolute path"
        with pytest.raises(UserError, match=f"PREFRAY_CACHE: must be an absolute path on a disk of the node.*'{relative}'"):
            cache.get(item("a", 1))


@pytest.mark.parametrize("size", ["200", "0GB", "many", "-1GB", "1e3GB", 200, 1.5])
def test_sizes_that_are_none(size: Any) -> None:
    from cluster.config import RayConfig

    with pytest.raises(ValueError, match="must be a size such as 200GB or 500MB"):
        RayConfig(cache_size=size)
    with pytest.raises(ValueError, match="must be an absolute path on the nodes' own disks"):
        RayConfig(cache_dir="s3://bucket/cache")
