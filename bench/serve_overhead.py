"""Measures what HTTP adds to a token: 64 streams at once over an engine that echoes, in tokens per second of one core.

    python -m max.bench.serve_overhead [--streams 64] [--tokens 400] [--json]

The server runs as `python -m max.serve.echo_engine`; the rate is streamed tokens over the CPU seconds that its process
took for them, so that a client on the same machine and other work on it do not count.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

_BAR = 3000.0
_MODEL = Path(__file__).resolve().parent.parent / "models" / "builtin"


@dataclass(frozen=True)
class Overhead:
    """Tokens that were streamed, and what the server's process took for them."""

    streams: int
    tokens: int
    cpu_s: float
    wall_s: float

    @property
    def tokens_per_cpu_s(self) -> float:
        """The rate of one core."""
        return self.tokens / self.cpu_s

    def line(self) -> str:
        """The result and whether it meets the bar."""
        word = "met" if self.tokens_per_cpu_s >= _BAR else "missed"
        return (
            f"{self.tokens:,} tokens in {self.streams} streams: {self.cpu_s:.2f} CPU s, {self.wall_s:.2f} s in all, "
            f"{self.tokens_per_cpu_s:,.0f} tokens per second of a core (bar {_BAR:,.0f}: {word})"
        )


async def measure(port: int, pid: int, streams: int, tokens: int) -> Overhead:
    """Streams so many tokens in each of so many chat completions at once."""
    await _stream(port, 8)  # what is imported and made at the first request
    before, started = _cpu_seconds(pid), time.perf_counter()
    counts = await asyncio.gather(*(_stream(port, tokens) for _ in range(streams)))
    return Overhead(streams, sum(counts), _cpu_seconds(pid) - before, time.perf_counter() - started)


async def _stream(port: int, tokens: int) -> int:
    """One streamed answer over a connection of its own; returns the tokens that its usage reports."""
    body = json.dumps(
        {
            "model": "echo",
            "messages": [{"role": "user", "content": "a robot of the sea, and whatever else there is to say of it"}],
            "max_tokens": tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    writer.write(head.encode() + body)
    answer = await reader.read(-1)
    writer.close()
    await writer.wait_closed()
    if b"data: [DONE]" not in answer:
        raise RuntimeError(f"the stream did not end: {answer[:300]!r}")
    counted = answer.rpartition(b'"completion_tokens":')[2]
    return int(counted.partition(b",")[0])


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Starts a server, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    command = [sys.executable, "-m", "max.serve.echo_engine", str(_MODEL), "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline().rpartition(":")[2])
            found = asyncio.run(measure(port, server.pid, options.streams, options.tokens))
        finally:
            server.terminate()
    print(json.dumps({**asdict(found), "tokens_per_cpu_s": found.tokens_per_cpu_s}) if options.json else found.line())


if __name__ == "__main__":
    main()
