"""What holds for all tests: strict dtypes, two devices, and never the user's own cache or settings."""

import gc
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import settings

# How long an example takes is the machine's matter: a test that fails by it says nothing of the code.
settings.register_profile("whole", deadline=None)
settings.register_profile("quick", deadline=None, max_examples=10)
settings.load_profile("whole")

# Set before anything imports jax, and for the processes that tests start; tests without jax stay without it.
os.environ |= {
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_NUM_CPU_DEVICES": "2",
    "JAX_PLATFORMS": "cpu",
}
for name in [name for name in os.environ if name.startswith(("MAX_", "MODULAR_"))]:
    del os.environ[name]
# A job in a shell's background ignores ^C, and what it starts inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Without the slow tests, properties are tried on a tenth of the examples (before modules scale their own)."""
    if config.option.markexpr == "not slow":
        settings.load_profile("quick")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """`quick(name=values, ...)`: of a test's cases those with such parameters are quick, and all others slow.

    Of several such marks one must hold. A parameter that the test does not have is an error.
    """
    for item in items:
        marks = list(item.iter_markers("quick"))
        if marks and not any(_holds(mark, item) for mark in marks):
            item.add_marker("slow")


def _holds(mark: pytest.Mark, item: pytest.Item) -> bool:
    assert isinstance(item, pytest.Function)
    return all(item.callspec.params[name] in values for name, values in mark.kwargs.items())


def pytest_collection() -> None:
    """What is imported stays: each collection of garbage would look at it again, a fifteenth of the time."""
    gc.disable()


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _no_cache_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["MODULAR_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, which this test and the processes that it starts use."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("MODULAR_CACHE_DIR", str(folder))
    return folder
