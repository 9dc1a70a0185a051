"""Our server beside another one, MAX, on the same model: `python -m max.bench.serve_peer --peer PATH --model DIR`.

All servers are up during the whole run, and one at a time is asked: in every round each has its turn with each number
of clients, so that all see the same machine. A client streams one completion after another, of a prompt of random token
ids that no other request shares. A run can be cut into slices: --running names servers that were started by hand, and
what --results holds is counted in.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from http.client import HTTPConnection
from itertools import product
from pathlib import Path
from urllib.parse import urlsplit

import click

from .serve_startup import free_port, wait_for_answer

OURS, OURS_BF16, PEER = "ours", "ours, bfloat16", "peer"
_ENCODINGS = {OURS: "float32", OURS_BF16: "bfloat16", PEER: "float32"}
_PROMPT_TOKENS, _NEW_TOKENS = 16, 64
_REQUESTS = {1: 2, 8: 16}
"""Of a turn, by the number of clients."""


@dataclass(frozen=True)
class Bar:
    """How a figure of ours has to stand to the peer's in the same round: times at most so long, rates at least."""

    series: str
    clients: int
    figure: str
    ratio: float

    def is_met(self, found: float) -> bool:
        return found >= self.ratio if self.figure == "tokens_per_s" else found <= self.ratio


BARS = (
    Bar(OURS, 1, "tpot_ms", 0.6),
    Bar(OURS, 8, "tokens_per_s", 2.0),
    Bar(OURS_BF16, 1, "tokens_per_s", 3.0),
    Bar(OURS_BF16, 8, "tokens_per_s", 3.0),
)


@dataclass(frozen=True)
class Turn:
    """One server in one round: medians over its requests, and the tokens of all by the time that they took."""

    series: str
    clients: int
    round: int
    ttft_ms: float
    tpot_ms: float
    tokens_per_s: float


@dataclass(frozen=True)
class _Streamed:
    """One answer: its tokens, and seconds to the first and from that to the last."""

    tokens: int
    first_s: float
    rest_s: float


def measure(url: str, model: str, series: str, clients: int, round: int, vocab_size: int) -> Turn:
    """One turn of a server with so many clients at once."""
    dice = random.Random(f"{clients} {round}")
    prompts = [[dice.randrange(vocab_size) for _ in range(_PROMPT_TOKENS)] for _ in range(_REQUESTS[clients])]
    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda prompt: _stream(url, model, prompt), prompts))
    seconds = time.perf_counter() - started
    if short := [each.tokens for each in answers if each.tokens != _NEW_TOKENS]:
        raise click.ClickException(f"{series} answered with {short[0]} tokens instead of {_NEW_TOKENS}")
    return Turn(
        series,
        clients,
        round,
        ttft_ms=1e3 * statistics.median(each.first_s for each in answers),
        tpot_ms=1e3 * statistics.median(each.rest_s / (each.tokens - 1) for each in answers),
        tokens_per_s=sum(each.tokens for each in answers) / seconds,
    )


def _stream(url: str, model: str, prompt: list[int]) -> _Streamed:
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": _NEW_TOKENS,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    connection = HTTPConnection(urlsplit(url).netloc, timeout=120)
    with contextlib.closing(connection):
        asked = time.perf_counter()
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise click.ClickException(f"{url} answered {response.status}: {response.read(500).decode()}")
        times: list[float] = []
        tokens = 0
        while line := response.readline():
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if event["choices"]:
                times.append(time.perf_counter())
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
    return _Streamed(tokens, times[0] - asked, times[-1] - times[0])


# --- the servers ---


@contextlib.contextmanager
def serving(program: Sequence[str], model: str, series: str) -> Iterator[str]:
    """A server of `model`, from its first answer to its end; gives its URL."""
    port = free_port()
    options = ["--model", model, "--port", str(port), "--devices", "cpu", "--max-batch-size", "8"]
    command = [*program, "serve", *options, "--quantization-encoding", _ENCODINGS[series]]
    environ = os.environ | {"OTEL_SDK_DISABLED": "true", "MODULAR_TELEMETRY_ENABLED": "0", "HF_HUB_OFFLINE": "1"}
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, env=environ, stdout=quiet, stderr=quiet, start_new_session=True) as server:
        try:
            wait_for_answer(server, port, model)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def _lines(turns: Sequence[Turn]) -> Iterator[str]:
    cells = [cell for cell in product(_REQUESTS, _ENCODINGS) if any(_cell(turn) == cell for turn in turns)]
    yield f"{'server':18}{'clients':>8}{'rounds':>8}{'TTFT ms':>10}{'TPOT ms':>10}{'tokens/s':>10}{'min-max':>16}"
    for clients, series in cells:
        found = [turn for turn in turns if _cell(turn) == (clients, series)]
        rates = [turn.tokens_per_s for turn in found]
        ttft, tpot = (statistics.median(getattr(turn, name) for turn in found) for name in ("ttft_ms", "tpot_ms"))
        yield (
            f"{series:18}{clients:8}{len(found):8}{ttft:10.1f}{tpot:10.2f}{statistics.median(rates):10.1f}"
            f"{f'{min(rates):.1f}-{max(rates):.1f}':>16}"
        )
    yield ""
    yield f"{'ratio to the peer, of the same round':44}{'median':>8}{'min-max':>14}{'bar':>7}"
    for bar in BARS:
        if ratios := _ratios(turns, bar):
            median, spread = statistics.median(ratios), f"{min(ratios):.2f}-{max(ratios):.2f}"
            verdict = "met" if bar.is_met(median) else "MISSED"
            name = f"{bar.series}, {bar.figure} of {bar.clients} clients"
            yield f"{name:44}{median:8.2f}{spread:>14}{bar.ratio:7.2f} {verdict}"


def _cell(turn: Turn) -> tuple[int, str]:
    return turn.clients, turn.series


def _ratios(turns: Sequence[Turn], bar: Bar) -> list[float]:
    ours = {turn.round: turn for turn in turns if _cell(turn) == (bar.clients, bar.series)}
    peer = {turn.round: turn for turn in turns if _cell(turn) == (bar.clients, PEER)}
    return [getattr(ours[at], bar.figure) / getattr(peer[at], bar.figure) for at in sorted(ours.keys() & peer.keys())]


@click.command(help=__doc__)
@click.option("--model", required=True, help="The checkpoint that all servers run.")
@click.option("--peer", help="The other `max` program; its caches have to be warm, or its start takes minutes.")
@click.option("--running", multiple=True, metavar="NAME=URL",
              help=f"A server that runs already, by what it is: {', '.join(_ENCODINGS)}.")  # fmt: skip
@click.option("--rounds", default=5, show_default=True, help="0 prints the table of --results.")
@click.option("--results", type=Path, help="File of the turns so far; those measured now are added.")
def main(model: str, peer: str | None, running: tuple[str, ...], rounds: int, results: Path | None) -> None:
    turns = [Turn(**row) for row in json.loads(results.read_text())] if results and results.exists() else []
    first = 1 + max((turn.round for turn in turns), default=0)
    vocab_size = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
    with contextlib.ExitStack() as stack:
        urls = dict(each.split("=", 1) for each in running)
        if rounds and not urls:
            ours = [sys.executable, "-m", "max"]
            programs = {OURS: ours, OURS_BF16: ours} | ({PEER: [peer]} if peer else {})
            urls = {name: stack.enter_context(serving(program, model, name)) for name, program in programs.items()}
        for at in range(first, first + rounds):
            for clients, (series, url) in product(_REQUESTS, urls.items()):
                turns.append(measure(url, model, series, clients, at, vocab_size))
    if results:
        results.write_text(json.dumps([asdict(turn) for turn in turns], indent=1) + "\n")
    for line in _lines(turns):
        click.echo(line)


if __name__ == "__main__":
    main()
