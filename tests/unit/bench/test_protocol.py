"""What a measuring process answers, and the prompts that all engines get."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from max import MaxError
from max.bench.measured_process import MeasuredProcess
from max.bench.peers.protocol import Times, prompt

RUNNER = """
from max.bench.peers.protocol import Times, serve

class Runner:
    def load(self, checkpoint, encoding, threads):
        print("chatter of a library")
        return f"{checkpoint.name} {encoding} {threads}"
    def decode(self, steps):
        times = Times()
        for _ in range(steps):
            times.add(lambda: sum(range(100_000)))
        return times
    def close(self):
        pass

if __name__ == "__main__":
    serve(Runner)
"""


def test_times_are_of_each_step() -> None:
    times = Times()
    assert times.add(lambda: sum(range(100_000))) == 4999950000
    assert len(times.wall) == len(times.cpu) == 1 and times.wall[0] > 0 and times.cpu[0] > 0


def test_prompts_are_the_same_for_a_seed_and_hold_no_special_token() -> None:
    ids = prompt(3, 2000, 4096)
    assert ids == prompt(3, 2000, 4096) != prompt(4, 2000, 4096)
    assert len(set(ids)) > 1000 and min(ids) >= 0 and max(ids) < 4080


def test_answers_are_lines_and_chatter_is_not_among_them(tmp_path: Path) -> None:
    (tmp_path / "runner.py").write_text(RUNNER)
    commands = [
        {"do": "load", "with": {"checkpoint": "/models/small", "encoding": "float32", "threads": 1}},
        {"do": "decode", "with": {"steps": 3}},
    ]
    done = subprocess.run(
        [sys.executable, str(tmp_path / "runner.py"), ",".join(map(str, _cpus()))],
        input="".join(json.dumps(command) + "\n" for command in commands),
        capture_output=True,
        text=True,
        check=True,
    )
    settings, times = map(json.loads, done.stdout.splitlines())
    assert settings == "small float32 1" and "chatter" in done.stderr
    assert len(times["wall"]) == 3 and min(times["wall"]) > 0


def test_a_process_that_ends_instead_of_answering_is_told() -> None:
    process = MeasuredProcess(Path(sys.executable), "no_such_runner", _cpus())
    try:
        with pytest.raises(MaxError, match="no_such_runner ended at load"):
            process.do("load")
    finally:
        process.close()


def _cpus() -> list[int]:
    return sorted(os.sched_getaffinity(0))[:1]
