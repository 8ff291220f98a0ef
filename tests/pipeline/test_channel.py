"""A channel carries what was put into it, whatever becomes of who has put it."""

from __future__ import annotations

import os
import pickle
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.ray.channel import NodeChannel

ROOT = Path(__file__).parents[2]

SENDER = """
import sys
from pathlib import Path
from pipeline.ray.channel import NodeChannel

channel = NodeChannel(Path(sys.argv[1]))
for number in range(1000):
    channel.put(("sent", number))
print("done", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def sender(tmp_path: Path) -> Any:
    """Another process, which has put a thousand objects and runs on."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", SENDER, str(tmp_path)], cwd=ROOT, text=True, **pipes)
    assert process.stdout is not None and process.stdout.readline() == "done\n"
    yield process
    process.kill()
    process.communicate()


def test_everything_comes_once_and_in_order_when_its_sender_is_killed(sender: Any, tmp_path: Path) -> None:
    channel = NodeChannel(tmp_path)
    os.kill(sender.pid, signal.SIGKILL)
    sender.wait()
    assert list(channel.take()) == [("sent", number) for number in range(1000)]
    assert list(channel.take()) == []
    channel.put("afterwards")
    assert list(channel.take()) == ["afterwards"]


def test_what_is_not_written_to_its_end_waits(tmp_path: Path) -> None:
    reader = NodeChannel(tmp_path)
    reader.put("first")
    reader.put("x" * 100)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    for missing in (1, 100, 118):  # of the second one's bytes; at last, of the number of its bytes
        file.write_bytes(content[:-missing])
        assert list(NodeChannel(tmp_path).take()) == ["first"]
    (tmp_path / f"1{file.name}").write_bytes(content)  # another process's
    assert list(reader.take()) == ["first", "first", "x" * 100]
    file.write_bytes(content)
    assert list(reader.take()) == ["x" * 100]


def test_what_finds_no_room_on_the_disk_is_not_sent(tmp_path: Path) -> None:
    channel = NodeChannel(tmp_path)
    channel.put("first")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        with pytest.raises(OSError, match="No space left on device"):
            channel.put("x" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    channel.put("third")
    assert list(channel.take()) == ["first", "third"]


def test_a_reader_that_failed_goes_on_behind_what_it_has_taken(tmp_path: Path) -> None:
    sender, reader = NodeChannel(tmp_path), NodeChannel(tmp_path)
    for number in range(3):
        sender.put(number)
    assert next(reader.take()) == 0
    assert list(reader.take()) == [1, 2]


def test_copies_in_one_process_keep_their_order(tmp_path: Path) -> None:
    """Ray Train's controller unpickles several: a failure must not come after the next attempt's workers."""
    channel = NodeChannel(tmp_path)
    for number, sender in enumerate([channel, pickle.loads(pickle.dumps(channel)), channel]):
        sender.put(number)
    assert list(channel.take()) == [0, 1, 2]


def test_actors_of_the_node_send_handles(ray_session: Any) -> None:
    @ray_session.remote(num_cpus=0)
    class Sender:
        def send(self, channel: NodeChannel) -> None:
            import ray

            from pipeline.ray.channel import NodeChannel

            group = ray.util.placement_group([{"CPU": 1}])
            channel.put((ray.get_runtime_context().current_actor, group, type(channel) is NodeChannel))

        def answer(self) -> str:
            return "here"

    sender = Sender.remote()
    with NodeChannel.opened() as channel:
        assert stat.S_IMODE(channel.folder.stat().st_mode) == 0o700
        ray_session.get(sender.send.remote(channel))
        ((actor, group, same),) = channel.take()
        assert ray_session.get(actor.answer.remote()) == "here"
        ray_session.util.remove_placement_group(group)
        assert same
    assert not channel.folder.exists()
    with pytest.raises(FileNotFoundError):
        channel.put("too late")
