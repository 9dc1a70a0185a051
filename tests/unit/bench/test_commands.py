"""Commands are measured as processes, and one that fails stops the measurement."""

import os
from importlib.metadata import version

import pytest

from max import MaxError
from max.bench.commands import run, surroundings


def test_a_run_has_its_time_and_its_memory() -> None:
    measured = run(["--version"], os.environ)
    assert 0.02 < measured.seconds < 30
    assert 5e6 < measured.peak_bytes < 5e8


def test_a_failing_command_is_not_a_measurement() -> None:
    with pytest.raises(MaxError, match="ended with 2"):
        run(["--no-such-option"], os.environ)


def test_the_surroundings_name_commit_and_versions() -> None:
    found = surroundings()
    assert found["jaxlib"] == version("jaxlib")
    assert found["commit"] and found["cores"]
