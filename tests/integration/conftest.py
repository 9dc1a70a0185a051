"""A small model with a random tokenizer's text, a cache filled for it once, and two ways to run the command line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from max.bench import random_model
from max.cli import main

_SIZE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 640,
}
SMALL = ("--max-batch-size", "1", "--max-batch-input-tokens", "2", "--max-length", "64")


@dataclass(frozen=True)
class Finished:
    """How a run of `max` ended."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return self.err.splitlines()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers whose random answers hold bytes that are no UTF-8."""
    return _write_model(tmp_path_factory.mktemp("model"), seed=0)


@pytest.fixture(scope="session")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the same shape with other weights."""
    return _write_model(tmp_path_factory.mktemp("twin"), seed=1)


def _write_model(folder: Path, seed: int) -> Path:
    random_model.SIZES["tests"] = _SIZE
    try:
        random_model.write_checkpoint(folder, "tests", seed=seed)
    finally:
        del random_model.SIZES["tests"]
    return folder


@pytest.fixture(scope="session")
def filled_cache(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in which `model` with the `small` settings is warm; tests that write to it take `cache` instead."""
    folder = tmp_path_factory.mktemp("filled") / "cache"
    done = _run("warm-cache", "--model", str(model), *SMALL, "--cache-dir", str(folder))
    assert done.code == 0, done.err
    return folder


@pytest.fixture
def cache(filled_cache: Path, tmp_path: Path) -> Path:
    """A copy of the filled cache."""
    return shutil.copytree(filled_cache, tmp_path / "cache")


@pytest.fixture(scope="session")
def small() -> tuple[str, ...]:
    """Settings under which little has to be compiled."""
    return SMALL


@pytest.fixture(scope="session")
def run() -> Callable[..., Finished]:
    """Runs `max` with these arguments as a process of its own; keywords go to subprocess.run."""
    return _run


def _run(*arguments: str, environ: dict[str, str] | None = None, **settings: Any) -> Finished:
    command = [sys.executable, "-W", "error", "-m", "max", *arguments]
    settings = {"cwd": "/", "capture_output": True, "text": True, "encoding": "utf-8", "timeout": 300} | settings
    done = subprocess.run(command, env={**os.environ, **(environ or {})}, check=False, **settings)
    return Finished(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., Finished]:
    """Runs `max` with these arguments in this process, which is quicker."""

    def run_here(*arguments: str) -> Finished:
        capsys.readouterr()
        code = main.run(arguments)
        shown = capsys.readouterr()
        return Finished(code, shown.out, shown.err)

    return run_here


@pytest.fixture
def generate(call: Callable[..., Finished], model: Path, filled_cache: Path) -> Callable[..., Finished]:
    """Runs a warm `max generate` on `model` in this process, with further arguments; fails unless it succeeds."""

    def run_generate(*arguments: str, code: int = 0) -> Finished:
        place = ("--model", str(model), "--cache-dir", str(filled_cache), *SMALL)
        done = call("generate", *place, "--prompt", "hello", "--seed", "1", *arguments)
        assert done.code == code, done.err
        return done

    return run_generate
