"""What a measuring process is told and answers, one JSON object a line.

This file and the peers' runners run in the peers' environments too: they import the standard library and the peer, and
are written for Python 3.11.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO


@dataclass
class Times:
    """Seconds of each step on the clock, and of all threads of the process together."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def add(self, step: Callable[[], Any]) -> Any:
        """Runs a step, keeps its times, and returns what it returned."""
        wall, cpu = time.perf_counter(), time.process_time()
        result = step()
        self.cpu.append(time.process_time() - cpu)
        self.wall.append(time.perf_counter() - wall)
        return result


class Runner(Protocol):
    """An engine under measurement."""

    def load(self, checkpoint: Path, encoding: str, threads: int) -> str:
        """Loads the model, converting the checkpoint where that was not done before; returns the settings in words."""
        ...

    def open(self, batch: int, context: int) -> list[int]:
        """Begins sequences, each with a prompt of `context` tokens, in place of those of before; their first tokens."""
        ...

    def decode(self, steps: int) -> Times:
        """Computes so many steps, each with the next token of every sequence, chosen greedily."""
        ...

    def prefill(self, tokens: int) -> Times:
        """Computes a prompt that was not seen before, up to its first token, while no sequence is open."""
        ...

    def close(self) -> None:
        """Ends what is open."""
        ...


def prompt(seed: int, tokens: int, vocab_size: int) -> list[int]:
    """Token ids without the special ones at the vocabulary's end: a hash, so that every engine gets the same."""
    state, ids = (seed + 1) * 0x9E3779B97F4A7C15 % 2**64, []
    for _ in range(tokens):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        ids.append((state >> 33) % (vocab_size - 16))
    return ids


def serve(make: Callable[[], Runner]) -> None:
    """Answers commands from stdin until it is closed; whatever else is printed goes to stderr.

    The CPUs to run on come first, on the command line: threads that a library starts when it is imported inherit them.
    """
    os.sched_setaffinity(0, {int(cpu) for cpu in sys.argv[1].split(",")})
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    runner = make()
    for line in sys.stdin:
        _answer(runner, json.loads(line), answers)
    runner.close()


def _answer(runner: Runner, command: dict[str, Any], answers: TextIO) -> None:
    name, arguments = command["do"], command["with"]
    if name == "load":
        arguments["checkpoint"] = Path(arguments["checkpoint"])
    result = getattr(runner, name)(**arguments)
    answers.write(json.dumps(asdict(result) if isinstance(result, Times) else result) + "\n")
    answers.flush()
