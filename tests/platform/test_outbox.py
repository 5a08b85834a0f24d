"""Events are on disk, whole and in order, whoever writes them and whatever happens to him."""

from __future__ import annotations

import json
import math
import multiprocessing
import resource
import signal
import threading
import time
from pathlib import Path

import pytest

from setwise.platform import run as runs
from setwise.platform.outbox import Outbox, Reader


def test_a_step_of_a_series_is_written_once_even_by_another_start(tmp_path: Path) -> None:
    path = tmp_path / "new" / "events.jsonl"
    first = Outbox(path)
    first.metrics(1, {"loss": 0.5})
    first.metrics(1, {"loss": 0.75})
    second = Outbox(path)
    second.metrics(1, {"loss": 0.9})
    second.metrics(1, {"r": 3.0}, series="bench")
    second.metrics(2, {"loss": 0.4})
    events = runs.read_events(path)
    assert [(e["series"], e["step"], e["values"]) for e in events] == [
        ("train", 1, {"loss": 0.5}),
        ("bench", 1, {"r": 3.0}),
        ("train", 2, {"loss": 0.4}),
    ]
    assert all(abs(event["time"] / 1000 - time.time()) < 60 for event in events)


def test_values_that_are_not_finite_are_named_and_not_sent(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    Outbox(path).metrics(3, {"a": math.nan, "b": 1.0, "c": -math.inf})
    metrics, tags = runs.read_events(path)
    assert metrics["values"] == {"b": 1.0}
    assert tags["kind"] == "tags"
    assert tags["values"] == {"not_finite.step_3": "a, c"}
    assert b"NaN" not in path.read_bytes()
    assert b"Infinity" not in path.read_bytes()


def test_a_line_that_a_crash_cut_short_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    outbox = Outbox(path)
    outbox.metrics(1, {"loss": 0.5})
    whole = path.stat().st_size
    outbox.metrics(2, {"loss": 0.4})
    data = path.read_bytes()
    for kept in range(whole + 1, len(data) - 1):
        path.write_bytes(data[:kept])
        again = Outbox(path)
        again.metrics(2, {"loss": 0.3})
        again.metrics(3, {"loss": 0.2})
        steps = [(event["step"], event["values"]["loss"]) for event in runs.read_events(path)]
        assert steps == [(1, 0.5), (2, 0.3), (3, 0.2)], kept


def test_events_of_one_append_are_all_there_or_none(tmp_path: Path) -> None:
    """A record's beginning is written once: half of it would stay half for ever."""
    path = tmp_path / "events.jsonl"
    Outbox(path).append({"kind": "params", "values": {"a": "1"}}, {"kind": "tags", "values": {"b": "2"}})
    data = path.read_bytes()
    for kept in range(1, len(data) - 1):
        path.write_bytes(data[:kept])
        assert len(runs.read_events(path)) in (0, 2), f"{kept} of {len(data)} bytes written before the crash"


def test_a_disk_that_was_full_costs_no_later_event(tmp_path: Path) -> None:
    """The kernel takes a part of a write that does not fit; the rest must be written, or be an error."""
    path = tmp_path / "events.jsonl"
    outbox = Outbox(path)
    outbox.append({"kind": "tags", "values": {"first": "1"}})
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, hard))
        failed = False
        try:
            outbox.append({"kind": "tags", "values": {"second": "2"}})
        except OSError:
            failed = True
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    outbox.append({"kind": "tags", "values": {"third": "3"}})
    kept = {key for event in runs.read_events(path) for key in event["values"]}
    assert "third" in kept
    assert failed or "second" in kept, "an event was lost, and nobody was told"


def test_events_are_json_lines_that_anybody_can_read(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    Outbox(path).append({"kind": "tags", "values": {"a": "line\nbreak \u2028 é"}})
    (line,) = path.read_text("utf-8").split("\n")[:-1]
    (event,) = json.loads(line)
    assert event["values"] == {"a": "line\nbreak \u2028 é"}


def write_many(path: Path, writer: int) -> None:
    outbox = Outbox(path)
    for step in range(40):
        outbox.append({"kind": "tags", "values": {"writer": str(writer), "number": str(step), "long": "x" * 20_000}})


def test_threads_and_processes_that_write_at_once_tear_no_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    shared = Outbox(path)

    def with_the_shared_one(writer: int) -> None:
        for step in range(40):
            shared.append(
                {"kind": "tags", "values": {"writer": str(writer), "number": str(step), "long": "x" * 20_000}}
            )

    fork = multiprocessing.get_context("fork")  # of nothing but this function; no server is open in this file
    processes = [fork.Process(target=write_many, args=(path, writer)) for writer in (0, 1)]
    threads = [threading.Thread(target=write_many, args=(path, writer)) for writer in (2, 3)]
    threads += [threading.Thread(target=with_the_shared_one, args=(writer,)) for writer in (4, 5)]
    for one in (*processes, *threads):
        one.start()
    for one in (*processes, *threads):
        one.join()
    lines = path.read_bytes().split(b"\n")
    assert lines.pop() == b""
    written = [json.loads(line)[0]["values"] for line in lines]
    for writer in range(6):
        numbers = [int(values["number"]) for values in written if values["writer"] == str(writer)]
        assert numbers == list(range(40)), f"writer {writer}"


def test_one_step_is_written_once_by_many_who_know_nothing_of_each_other(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    outboxes = [Outbox(path) for _ in range(8)]

    def write(outbox: Outbox, value: float) -> None:
        for step in range(1, 11):
            outbox.metrics(step, {"loss": value})

    threads = [
        threading.Thread(target=write, args=(outbox, float(number)))
        for number, outbox in enumerate([*outboxes, outboxes[0]])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(event["step"] for event in runs.read_events(path)) == list(range(1, 11))
    assert outboxes[3].last_step("train") == 10
    assert outboxes[3].last_step("system") == 0


def test_a_step_that_did_not_fit_on_the_disk_is_written_when_there_is_room(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    outbox = Outbox(path)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
        with pytest.raises(OSError, match="too large"):
            outbox.metrics(1, {"loss": 0.5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    outbox.metrics(1, {"loss": 0.5})
    assert [event["step"] for event in runs.read_events(path)] == [1]


def test_a_reader_gets_each_event_once_and_a_line_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    reader = Reader(path)
    assert reader.new() == []
    outbox = Outbox(path)
    outbox.metrics(1, {"loss": 0.5})
    outbox.append({"kind": "tags", "values": {"a": "1"}}, {"kind": "status", "value": "FINISHED"})
    data = path.read_bytes()
    first = data.index(b"\n") + 1
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        reader = Reader(path)
        before = reader.new()
        path.write_bytes(data)
        lines = [*before, *reader.new()]
        assert [event["kind"] for events, _ in lines for event in events] == ["metrics", "tags", "status"], cut
        for events, end in lines:
            rest = [event for events, _ in Reader(path, end).new() for event in events]
            assert len(rest) == (2 if events[0]["kind"] == "metrics" else 0), cut
    assert Reader(path, first).new()[0][1] == len(data)


def test_a_reader_passes_over_what_a_crash_left(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    Outbox(path).metrics(1, {"loss": 0.5})
    reader = Reader(path)
    reader.new()
    with path.open("ab") as stream:
        stream.write(b'[{"kind": "metr')
    assert reader.new() == []
    Outbox(path).metrics(2, {"loss": 0.25})
    assert [event["step"] for events, _ in reader.new() for event in events] == [2]
    assert reader.new() == []
