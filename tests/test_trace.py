# SPDX-License-Identifier: MIT
"""What a disk tells of its life: each request in stages, each command with its answer."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys

import pytest

import ublk
from tests.support import (
    HERE,
    AsyncRam,
    Forked,
    Ram,
    error_of,
    kernel,
    opened,
    orphan,
    read_at,
    since,
    verb,
)
from tests.test_async import StandIn, TracedNopQueue, serve, target_of
from tests.test_states import in_child

STAGES = ["arrived", "decoded", "handler", "result", "committed"]


class Records(list):
    """What was told, each as a dict of stage and all about it."""

    def __call__(self, ns, stage, more):
        self.append({"ns": ns, "stage": stage, **more})

    def of(self, request):
        """Return the records of a request, without times."""
        return [{name: value for name, value in record.items() if name != "ns"}
                for record in self if record.get("request") == request]

    def stages(self, request):
        return [record["stage"] for record in self.of(request)]

    def commands(self, name):
        """Return the records of a command."""
        return [record for record in self if record.get("command") == name]


def told(target, **options):
    """Return what a queue tells that serves a target's requests by a stand-in."""
    records = Records()
    serve(target, trace=ublk.Trace(records), **options)
    return records


class Answering(Ram):
    """It serves lists of tags."""

    def answer(self, queue, tags):
        for tag in tags:
            queue.complete(tag, queue.sectors[tag] * ublk.SECTOR)


class Mapping(Ram):
    """Its data lie in a file, of which it has a descriptor that is good for one way only."""

    def __init__(self, mode=os.O_RDONLY):
        super().__init__()
        self.fd = os.open("/dev/zero", mode)

    def map(self, offset, length, write):
        return self.fd, offset


def test_a_request_is_told_stage_by_stage():
    records = told(Ram(), depth=1)
    where = {"queue": 0, "tag": 0, "request": 1}
    assert records.of(1) == [
        {"stage": "arrived", **where},
        {"stage": "decoded", **where, "op": "READ", "flags": [], "sector": 0, "sectors": 8},
        {"stage": "handler", **where, "by": "_answer_by_handler"},
        {"stage": "result", **where, "result": 4096},
        {"stage": "committed", **where},
    ]


def test_times_go_forward():
    times = [record["ns"] for record in told(Ram(), rounds=3)]
    assert times == sorted(times) and len(times) == 4 * 3 * len(STAGES)


@pytest.mark.parametrize("target, way", [(AsyncRam, "_answer_by_task"), (Answering, "_answer_by_target"),
                                         (ublk.Null, "_answer_by_target")])
def test_every_way_of_serving_is_told(target, way):
    records = told(target(), rounds=2)
    for request in range(1, 9):
        assert records.stages(request) == STAGES
        assert records.of(request)[2]["by"] == way


@pytest.mark.parametrize("name", ["EIO", "ENOSPC"])
def test_an_error_is_told_by_its_name(name):
    number = getattr(errno, name)

    def read(target, offset, buffer):
        raise OSError(number, "broken")

    result = told(target_of(read=read), depth=1).of(1)[3]
    assert (result["result"], result["error"]) == (-number, name)


def test_of_a_busy_disk_some_requests_are_told_whole_and_the_others_counted(monkeypatch):
    monkeypatch.setattr(ublk, "TOLD_EACH_SECOND", 2)
    monkeypatch.setattr(ublk.time, "monotonic", lambda: 1.0)
    records = told(Ram(), rounds=5)
    assert records.stages(1) == records.stages(2) == STAGES
    assert [record["requests"] for record in records if record["stage"] == "dropped"] == [4 * 5 - 2]
    assert len(records) == 2 * len(STAGES) + 1


def test_each_second_begins_anew(monkeypatch):
    now = [1.0]
    monkeypatch.setattr(ublk, "TOLD_EACH_SECOND", 2)
    monkeypatch.setattr(ublk.time, "monotonic", lambda: now[0])
    records = Records()
    trace = ublk.Trace(records)
    assert [trace.number() for _ in range(4)] == [1, 2, 0, 0]
    now[0] = 2.5
    assert [trace.number() for _ in range(3)] == [5, 6, 0]
    assert [record["requests"] for record in records] == [2]


@pytest.mark.parametrize("error", [OSError(28, "no space left"), SystemExit(1)])
def test_nobody_hears_it_and_the_requests_are_served_all_the_same(error, monkeypatch, capfd):
    monkeypatch.setattr(ublk, "_bugs", {})

    def deaf(*_):
        raise error

    queue = serve(Ram(), trace=ublk.Trace(deaf))
    assert sorted(queue.answers) == [(tag, 4096) for tag in range(4)]
    assert capfd.readouterr().err.count("Traceback") == 1


def test_a_forked_child_tells_nothing_and_waits_for_nobody_who_does():
    device = StandIn(Ram(), trace=ublk.Trace(Records()))
    queue = TracedNopQueue(device, 1)
    with queue.trace._lock:
        assert in_child(queue.close) == 0
    queue.close()
    device.close()


def test_a_file_gets_an_object_a_line(tmp_path):
    narrate = ublk.narrator(str(tmp_path / "trace"))
    serve(Ram(), trace=ublk.Trace(narrate))
    records = [json.loads(line) for line in (tmp_path / "trace").read_text().splitlines()]
    assert [record["stage"] for record in records if record["tag"] == 3] == STAGES


def test_standard_error_gets_text(capsys):
    narrate = ublk.narrator("-")
    narrate(1_500_000_000, "decoded", {"queue": 0, "tag": 7, "op": "WRITE", "flags": ["META", "FUA"]})
    assert capsys.readouterr().err == (
        "ublk: 1.500000 decoded   queue: 0, tag: 7, op: WRITE, flags: META, FUA\n")


def test_the_option_takes_no_word_behind_it():
    options, rest = ublk.device_parser().parse_known_args(ublk.spelled_out(["--trace", "disk.img"]))
    assert (options.trace, rest) == ("-", ["disk.img"])
    assert ublk.device_parser().parse_args(ublk.spelled_out(["--trace=disk.img"])).trace == "disk.img"


def test_a_server_leaves_the_trace_of_the_one_before_it(tmp_path):
    (tmp_path / "trace").write_text("how it died\n")
    ublk.narrator(str(tmp_path / "trace"))(0, "begun", {})
    assert (tmp_path / "trace").read_text() == 'how it died\n{"ns": 0, "stage": "begun"}\n'


def test_the_trace_is_drawn(tmp_path):
    serve(Ram(), rounds=5, trace=ublk.Trace(ublk.narrator(str(tmp_path / "trace"))))
    done = subprocess.run([sys.executable, HERE / "lab" / "pictures.py", tmp_path / "trace"],
                          capture_output=True, text=True, check=True)
    assert done.stdout.startswith("<svg ") and "20 requests" in done.stdout


# ---- with the driver -------------------------------------------------------------------------------------

def traced(target, **options):
    """Return what a disk tells whose first 4 KiB are read."""
    records = Records()
    with ublk.Device(target, trace=records, partition_scan=False, **options) as disk, opened(disk.path) as fd:
        read_at(fd, 0, 4096)
    return records


@kernel
@pytest.mark.parametrize("target", [Ram, AsyncRam, Answering, ublk.Null])
def test_a_real_request_is_told_as_the_stand_ins(target):
    assert traced(target(), depth=1).of(1) == told(target(), depth=1).of(1)


@kernel
@since("7.0")
@pytest.mark.parametrize("target", [Ram, AsyncRam, ublk.Null])
def test_with_batches_it_is_told_alike(target):
    assert traced(target(), depth=2, batch=True).of(1) == told(target(), depth=1).of(1)


@kernel
def test_what_the_kernel_moves_is_told():
    records = traced(Mapping(), data_path="copy").of(1)
    assert [record["stage"] for record in records] == STAGES
    assert (records[2]["by"], records[3]["result"]) == ("_answer_by_map", 4096)


@kernel
@since("7.0")
def test_with_batches_each_part_of_a_chain_is_told():
    records = traced(Mapping(), data_path="copy", batch=True).of(1)
    assert [record["stage"] for record in records] == [*STAGES[:3], "chain", *STAGES[3:]]
    assert (records[3]["part"], records[3]["result"]) == (1, 4096)


@kernel
def test_a_chain_that_breaks_is_told():
    records = traced(Mapping(os.O_WRONLY), data_path="copy").of(1)
    assert [record["stage"] for record in records] == [*STAGES, "chain", *STAGES[3:]]
    assert (records[5]["part"], records[5]["error"]) == (1, "EBADF")


@kernel
def test_each_command_is_told_with_its_fields_and_answer():
    records = traced(Ram(1 << 20), depth=5, recovery="requeue")
    sent, answer = records.commands("ADD_DEV")
    assert (sent["stage"], sent["device"], sent["queue_depth"]) == ("sent", -1, 5)
    assert (answer["stage"], answer["result"], answer["queue_depth"]) == ("answer", 0, 5)
    assert "USER_RECOVERY" in sent["flags"] and "USER_RECOVERY" in answer["flags"]
    sent, answer = records.commands("SET_PARAMS")
    assert sent["basic"]["dev_sectors"] == 2048
    sent, answer = records.commands("START_DEV")
    assert (sent["data"], answer["result"]) == (os.getpid(), 0)
    names = [record["command"] for record in records if record["stage"] == "sent"]
    assert names[-1] == "DEL_DEV"


@kernel
def test_a_command_that_fails_is_told_with_the_reason():
    records = Records()
    with ublk.TracedControl(ublk.Trace(records)) as control:
        assert error_of(control.stop_dev, 77) == 19
    answer = records.commands("STOP_DEV")[-1]
    assert (answer["result"], answer["error"]) == (-19, "ENODEV")
    assert answer["reason"]


@kernel
@pytest.mark.parametrize("trace, kinds", [
    (None, (ublk.Control, ublk.Queue)),
    (Records(), (ublk.TracedControl, ublk.TracedQueue)),
])
def test_a_disk_without_a_trace_has_the_classes_it_had(trace, kinds):
    with ublk.Device(Ram(), trace=trace) as disk:
        assert (type(disk.control), type(disk._workers[0].queue)) == kinds


@kernel
@since("7.0")
def test_so_it_has_with_batches():
    with ublk.Device(Ram(), batch=True) as disk:
        assert type(disk._workers[0].queue) is ublk.BatchQueue


@kernel
def test_the_command_line_traces(tmp_path):
    server = Forked("null", f"--trace={tmp_path / 'trace'}", "--no-partition-scan").live()
    with opened(server.path) as fd:
        read_at(fd, 0, 4096)
    server.kill(signal.SIGTERM)
    records = [json.loads(line) for line in (tmp_path / "trace").read_text().splitlines()]
    assert [record["stage"] for record in records if record.get("request") == 1] == STAGES


@kernel
def test_a_trace_on_standard_error_is_text_between_other_messages():
    server = Forked("null", "--trace").live()
    server.kill(signal.SIGTERM)
    assert "sent      command: ADD_DEV, device: -1" in server.said()


@kernel
def test_a_new_server_may_be_traced(tmp_path):
    dead = orphan("null", "-r", "requeue")
    assert verb("recover", dead.id, "--background", f"--trace={tmp_path / 'trace'}").status == 0
    verb("del", dead.id)
    assert "END_USER_RECOVERY" in (tmp_path / "trace").read_text()


@kernel
def test_the_same_words_with_a_trace_are_the_same_disk(tmp_path):
    words = "null", "-r", "requeue", "-n", 5
    orphan(*words)
    done = verb(*words, "--background", f"--trace={tmp_path / 'trace'}")
    assert done.status == 0, done
    verb("del", 5)
    assert "END_USER_RECOVERY" in (tmp_path / "trace").read_text()
