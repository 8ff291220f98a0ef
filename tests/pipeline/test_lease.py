"""One process at a time holds a lease: on a path, in an object store, and on storage without conditional writes."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import pytest
from moto.s3.responses import S3Response
from werkzeug.datastructures import Headers

from pipeline.errors import RunFailed
from pipeline.io import holder as holders
from pipeline.io import lease, lease_records
from pipeline.io.holder import Holder, here
from pipeline.io.lease import LeaseTaken, held
from pipeline.io.lease_records import LocalRecords, ObjectRecords, PlainRecords, open_records
from pipeline.io.retry import waits
from pipeline.io.storage import Folder
from tests.leases import NAME, HoldingProcess, another, give_sign, holder_of, leave
from tests.s3 import Bucket, s3_server
from tests.waiting import wait_for

KINDS = {"path": LocalRecords, "s3": ObjectRecords, "plain": PlainRecords}
Start = Callable[..., HoldingProcess]


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    if request.param == "s3":
        found = Folder(request.getfixturevalue("s3").uri("run"))
    else:
        found = Folder(tmp_path / "run" if request.param == "path" else f"shared://{tmp_path}/run")
    found.create()
    assert type(open_records(found, NAME)) is KINDS[request.param]
    return found


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_records, "RACE_S", 0.3)
    monkeypatch.setattr(lease, "POLL_S", 0.1)
    monkeypatch.setattr(lease, "UNREADABLE", replace(lease.UNREADABLE, validity=0.3))


@pytest.fixture
def start() -> Iterator[Start]:
    """Start another process that takes leases."""
    started: list[HoldingProcess] = []

    def start_one(**settings: Any) -> HoldingProcess:
        started.append(HoldingProcess(**settings))
        return started[-1]

    yield start_one
    for process in started:
        process.end()


def refused(folder: Folder, name: str = "process") -> None:
    with pytest.raises(LeaseTaken, match=f"is being written by {name}"), held(folder, NAME):
        pass


def test_it_is_held_renewed_and_given_back(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    records = open_records(folder, NAME)
    with held(folder, NAME) as mine:
        seen = set[str]()
        wait_for(lambda: seen.add(records.read().version) or len(seen) > 3)
        refused(folder, f"process {os.getpid()} on ")
        mine.check()
    assert folder.names() == [] and holder_of(folder, NAME) is None


def test_of_two_threads_one_waits_and_says_for_whom(folder: Folder) -> None:
    said: list[Holder] = []

    def wait() -> bool:
        with held(folder, NAME, said.append):
            return released

    released = False
    with ThreadPoolExecutor() as threads:
        with held(folder, NAME):
            waiting = threads.submit(wait)
            wait_for(lambda: any(wait.startswith(f"process {os.getpid()} on") for wait in waits))
            time.sleep(0.3)
            released = True
        assert waiting.result()
    assert [holder.process for holder in said] == [os.getpid()]


@pytest.mark.parametrize("validity", [0.5])
def test_another_machine_is_waited_for_while_it_gives_signs_of_life(folder: Folder, validity: float) -> None:
    """Whatever its clock says."""
    for skew in (-300, 300):
        other = another(since=time.time() + skew, validity=validity)
        leave(folder, NAME, other)
        with ThreadPoolExecutor() as threads:
            asking = threads.submit(refused, folder, "process 7 on node-7")
            wait_for(lambda: any("a sign of life of process 7 on node-7" in wait for wait in waits))
            give_sign(folder, NAME, other, 1)
            asking.result()
        since = time.monotonic()
        with held(folder, NAME):  # it gives no more signs
            assert time.monotonic() - since >= validity
            assert holder_of(folder, NAME).process == os.getpid()


@pytest.mark.processes
def test_a_process_that_has_ended_is_followed_at_once(folder: Folder, start: Start) -> None:
    """Also a killed one that its parent has not waited for."""
    killed, interrupted = start(), start()
    assert killed.ask(str(folder.where)) == "holds"
    refused(folder, f"process {killed.pid} on ")
    killed.process.kill()
    wait_for(lambda: psutil.Process(killed.pid).status() == psutil.STATUS_ZOMBIE)
    assert str(holder_of(folder, NAME)).startswith(f"process {killed.pid} on ")
    assert interrupted.ask(str(folder.where)) == "holds"
    interrupted.process.send_signal(signal.SIGINT)
    interrupted.process.wait()
    assert holder_of(folder, NAME) is None


@pytest.mark.processes
def test_who_was_suspended_for_too_long_writes_nothing_more(folder: Folder, start: Start) -> None:
    """On another machine, whose clock is five minutes ahead."""
    other = start(beat=0.1, validity=1.0, machine="elsewhere", skew=300.0)
    assert other.ask(str(folder.where)) == "holds"
    said: list[Holder] = []
    with ThreadPoolExecutor() as threads:
        done = threading.Event()

        def follow() -> float:
            with held(folder, NAME, said.append):
                since = time.monotonic() - stopped
                done.wait()
                return since

        following = threads.submit(follow)
        wait_for(lambda: said)
        time.sleep(1.5)  # longer than it is valid: its renewals are seen
        assert not following.done() and holder_of(folder, NAME).process == other.pid
        stopped = time.monotonic()
        other.process.send_signal(signal.SIGSTOP)
        wait_for(lambda: holder_of(folder, NAME).process == os.getpid())
        other.process.send_signal(signal.SIGCONT)
        lost = other.ask("end")
        assert f"was taken over by process {os.getpid()} on " in lost and "nothing more is" in lost
        assert holder_of(folder, NAME).process == os.getpid()
        done.set()
        assert following.result() >= 0.8
    assert len(said) == 1


@pytest.mark.processes
def test_of_processes_that_start_at_once_one_has_it(folder: Folder, start: Start) -> None:
    """Where nobody held it, and where a dead process did."""
    plain = isinstance(open_records(folder, NAME), PlainRecords)
    racers = [start() for _ in range(3)]
    for turn in range(3 if plain else 20):
        place = f"{folder.where}-{turn}"
        if turn % 2:
            leave(Folder(place if "://" in place else Path(place)), NAME, another(machine=here().machine, process=2**30))
        for racer in racers:
            racer.tell(place)
        answers = [racer.answer() for racer in racers]
        assert answers.count("holds") == 1, answers
        winner = racers[answers.index("holds")]
        assert all(f"is being written by process {winner.pid} on" in answer for answer in answers if answer != "holds")
        assert winner.ask("end") == "ended"


@pytest.mark.parametrize(
    ("changes", "is_free"),
    [
        ({"process": 2**30}, True),
        ({"process": os.getppid()}, True),  # a later process of the same number
        ({"process": os.getpid()}, True),  # of this one, or of an earlier one of its number, that has ended
        ({"process": os.getppid(), "started": None}, True),
        ({"machine": f"{holders.machine()}, in another container"}, False),
    ],
)
def test_whose_number_says_nothing(tmp_path: Path, changes: dict[str, Any], is_free: bool) -> None:
    """Numbers of processes come again, and those of another container are others, whatever the host is called."""
    folder, mine = Folder(tmp_path), here()
    record = {**json.loads(mine.record(0)), "started": mine.started - 100, "validity": 0.5, "id": "a", **changes}
    open_records(folder, NAME).create(json.dumps(record))
    since = time.monotonic()
    with held(folder, NAME):
        assert (time.monotonic() - since < 0.5) == is_free


def test_what_is_no_record_is_nobodys(folder: Folder) -> None:
    for text in ("", '{"id": "a"', "7", '{"process": 7}'):
        assert open_records(folder, NAME).create(text) is not None
        with held(folder, NAME):
            pass


def test_what_a_desktop_leaves_in_a_record_is_nobodys(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / ".DS_Store").touch()
    with held(Folder(tmp_path), NAME):
        pass
    assert not (tmp_path / NAME).exists()


def test_a_deleted_record_ends_the_lease(folder: Folder) -> None:
    with held(folder, NAME) as mine:
        folder.delete(NAME)
        mine.renew()
        assert mine.is_lost
        with pytest.raises(
            RunFailed, match="^the record of who writes .*run was deleted, by hand or by another process; nothing"
        ):
            mine.check()
    assert folder.names() == []


def test_a_renewal_whose_answer_was_lost_has_succeeded(folder: Folder) -> None:
    with held(folder, NAME) as mine:
        give_sign(folder, NAME, mine._me, 1)  # what the store did, and could not say any more
        mine.renew()
        mine.check()
        assert not mine.is_lost
    assert folder.names() == []


def test_storage_that_is_away_for_longer_ends_no_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next write waits for it; then nobody else has taken it over, since nobody could look."""
    monkeypatch.setattr(holders, "VALIDITY_S", 0.6)
    monkeypatch.setattr(lease, "BEAT_S", 0.1)
    with s3_server() as server:
        folder = Folder(server.uri("run"))
        with held(folder, NAME) as mine, ThreadPoolExecutor() as threads:
            server.stop()
            time.sleep(0.8)
            checking = threads.submit(mine.check)
            time.sleep(0.2)
            assert not checking.done()
            server.start()
            checking.result()
            assert not mine.is_lost
        assert holder_of(folder, NAME) is None


def test_a_store_that_ignores_conditions_is_found_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As some that speak S3's protocol do."""
    with s3_server() as server:
        folder = Folder(server.uri("run"))
        put_object = S3Response.put_object

        def put_anyway(response: Any) -> Any:
            response.headers = Headers([entry for entry in response.headers if entry[0] not in ("If-Match", "If-None-Match")])
            return put_object(response)

        monkeypatch.setattr(S3Response, "put_object", put_anyway)
        assert isinstance(open_records(folder, NAME), PlainRecords)
        assert "no conditional writes to it.lease: the store ignores their conditions" in caplog.text
        assert server.objects() == []
        with held(folder, NAME):
            refused(folder)


def test_keys_of_a_profile_and_of_a_uri(s3: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, secret = s3.variables["AWS_ACCESS_KEY_ID"], s3.variables["AWS_SECRET_ACCESS_KEY"]
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    endpoint = quote(s3.variables["AWS_ENDPOINT_URL"].removeprefix("http://"))
    uri = f"s3://{key}:{quote(secret, safe='')}@{s3.name}/run?scheme=http&region=us-east-1&endpoint_override={endpoint}"
    assert type(open_records(Folder(uri), NAME)) is ObjectRecords
    (tmp_path / "credentials").write_text(f"[mine]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    assert type(open_records(Folder(s3.uri("run")), NAME)) is ObjectRecords
