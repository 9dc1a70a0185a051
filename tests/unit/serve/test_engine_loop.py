"""The worker's loop over a line and an engine that are lists: who is told what."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from max import CapacityError, MaxError
from max.cache.counters import Counters
from max.compiler.limits import Limits
from max.runtime.sampling import SamplingParams
from max.runtime.scheduler import Scheduler
from max.runtime.step_results import EngineLost, EngineStats, Failure, StepReport, Token
from max.serve.engine_loop import EngineLoop
from max.serve.messages import (
    Abort,
    Ended,
    Hello,
    Loading,
    PrefixCacheReset,
    ResetPrefixCache,
    Sampling,
    StepStats,
    StoreStats,
    Submit,
    Tokens,
)

A, B = b"\x01", b"\x02"


class Line:
    """Takes and gives messages; the clients in `gone` cannot be reached."""

    def __init__(self) -> None:
        self.incoming: list[tuple[bytes, Any]] = []
        self.sent: list[tuple[bytes, Any]] = []
        self.gone: list[bytes] = []

    def receive(self, _timeout_ms: int | None) -> Iterator[tuple[bytes, Any]]:
        while self.incoming:
            yield self.incoming.pop(0)

    def say(self, client: bytes, message: Any) -> None:
        self.sent.append((client, message))

    def flush(self) -> list[bytes]:
        return self.gone

    def take(self) -> list[tuple[bytes, Any]]:
        sent, self.sent = self.sent, []
        return sent


class Engine:
    """Gives what it was told to give."""

    def __init__(self) -> None:
        self.is_idle = False
        self.request_ids: list[str] = []
        self.results: list[Any] = []
        self.error: Exception | None = None
        self.stats = EngineStats()
        self.scheduler = Scheduler(Limits(16, 3, 4, 9, (1, 8)))

    def add(self, request: Any) -> None:
        if self.error:
            raise self.error
        self.request_ids.append(request.id)

    def abort(self, name: str) -> bool:
        if name not in self.request_ids:
            return False
        self.request_ids.remove(name)
        return True

    def step(self) -> list[Any]:
        if self.error:
            raise self.error
        results, self.results = self.results, []
        return results

    def reset_prefix_cache(self) -> int:
        return 5


@pytest.fixture
def line() -> Line:
    return Line()


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def loop(line: Line, engine: Engine) -> EngineLoop:
    loop = EngineLoop(line)  # type: ignore[arg-type]
    loop.open(engine, None)  # type: ignore[arg-type]
    return loop


def submit(id: str, **changes: Any) -> Submit:
    return Submit(id, [1], Sampling(**changes))


def test_the_wire_carries_every_sampling_parameter():
    defaults = SamplingParams()
    assert msgspec.structs.asdict(Sampling()) == {f.name: getattr(defaults, f.name) for f in fields(SamplingParams)}


def test_whoever_comes_is_told_how_the_start_goes(line):
    loop = EngineLoop(line)
    loop.announce(Loading("reading"))
    line.incoming = [(A, Hello()), (A, submit("r"))]
    loop.turn(0)
    said = line.take()
    assert said[0] == (A, Loading("reading"))
    assert (said[1][1].how, said[1][1].kind) == ("rejected", "capacity")
    loop.announce(Loading("compiling", 0.5))
    assert line.take() == [(A, Loading("compiling", 0.5))]


def test_tokens_go_to_the_client_of_their_request(line, engine, loop):
    line.incoming = [(A, submit("same")), (B, submit("same"))]
    loop.turn(0)
    first, second = engine.request_ids
    engine.results = [Token(second, 7, None), Token(first, 8, "stop", cached_tokens=4)]
    loop.turn(0)
    assert line.take() == [(B, Tokens("same", [7])), (A, Tokens("same", [8], None, "stop", 4))]


def test_a_refused_request_is_answered_with_the_reason(line, engine, loop):
    line.incoming = [(A, submit("r", top_p=7.0))]
    loop.turn(0)
    ((client, ended),) = line.take()
    assert (client, ended.how, ended.kind) == (A, "rejected", "user")
    assert "top_p" in ended.message
    assert not engine.request_ids


@pytest.mark.parametrize(
    ("error", "how", "kind"),
    [(CapacityError("full", "later"), "rejected", "capacity"), (KeyError("no such thing"), "failed", "internal")],
)
def test_whatever_goes_wrong_with_one_request_the_loop_goes_on(line, engine, loop, error, how, kind):
    add = engine.add

    def failing(request: Any) -> None:
        if request.id.endswith(":bad"):
            raise error
        add(request)

    engine.add = failing  # type: ignore[method-assign]
    line.incoming = [(A, submit("bad")), (A, submit("good"))]
    loop.turn(0)
    ((_, ended),) = line.take()
    assert (ended.id, ended.how, ended.kind) == ("bad", how, kind)
    assert [name.rpartition(":")[2] for name in engine.request_ids] == ["good"]


def test_an_abort_is_answered_once(line, engine, loop):
    line.incoming = [(A, submit("r")), (A, Abort("r")), (A, Abort("r"))]
    loop.turn(0)
    assert line.take() == [(A, Ended("r", "aborted"))]


def test_a_failed_request_is_told_so_and_the_others_go_on(line, engine, loop):
    line.incoming = [(A, submit("r")), (A, submit("s"))]
    loop.turn(0)
    first, second = engine.request_ids
    engine.results = [Failure(first, MaxError("broken", "fix")), Token(second, 1, None)]
    loop.turn(0)
    assert line.take() == [(A, Ended("r", "failed", "internal", "broken", "fix")), (A, Tokens("s", [1]))]


def test_a_lost_engine_fails_all_and_ends_the_loop(line, engine, loop):
    line.incoming = [(A, submit("r"))]
    loop.turn(0)
    engine.error = EngineLost([Failure(engine.request_ids[0], MaxError("broken"))])
    with pytest.raises(EngineLost):
        loop.turn(0)
    assert [(client, ended.how) for client, ended in line.take()] == [(A, "failed")]


def test_the_requests_of_a_client_that_has_gone_are_aborted(line, engine, loop):
    line.incoming = [(A, submit("r")), (B, submit("s"))]
    line.gone = [A]
    loop.turn(0)
    assert [name.rpartition(":")[2] for name in engine.request_ids] == ["s"]


def test_a_step_that_does_not_end_is_seen_from_outside(engine, loop):
    seen: list[float] = []

    def slow() -> list[Any]:
        time.sleep(0.02)
        seen.append(loop.stalled_s)
        return []

    engine.step = slow  # type: ignore[method-assign]
    loop.turn(0)
    engine.is_idle = True
    loop.turn(0)
    assert seen[0] >= 0.02 and seen[1] == 0 == loop.stalled_s


def test_every_client_is_told_of_a_step_once(line, engine, loop):
    line.incoming = [(A, Hello()), (B, Hello())]
    engine.stats.count(StepReport(True, 2, 10, 1, 30, 0.1, 0.2, 1))
    loop.turn(0)
    told = [(client, message) for client, message in line.take() if isinstance(message, StepStats)]
    assert [client for client, _ in told] == [A, B]
    assert (told[0][1].batch_type, told[0][1].input_tokens, told[0][1].num_pages) == ("CE", 10, 8)
    loop.turn(0)
    assert line.take() == []


def test_what_is_done_with_the_store_is_told_when_it_changes_and_to_whoever_comes(line, engine, loop):
    counters, loaded = Counters(bytes_read=5), SimpleNamespace(num_loaded=2)
    loop.open(engine, loaded, counters)
    engine.is_idle = True
    line.incoming = [(A, Hello())]
    loop.turn(0)
    loop.turn(0)
    assert line.take() == [(A, StoreStats(Counters(bytes_read=5).to_json(), 2))]
    counters.misses["damaged"] += 1
    loop.turn(0)
    line.incoming = [(B, Hello())]
    loop.turn(0)
    now = StoreStats(counters.to_json(), 2)
    assert line.take() == [(A, now), (B, now)]
    loaded.num_loaded = 3
    loop.turn(0)
    assert [message.executables for _, message in line.take()] == [3, 3]


def test_a_reset_is_answered_with_the_pages_that_were_forgotten(line, loop):
    line.incoming = [(B, ResetPrefixCache())]
    loop.turn(0)
    assert line.take() == [(B, PrefixCacheReset(5))]
