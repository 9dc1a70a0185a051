"""What holds for all tests: strict dtypes, two devices, and never the user's own cache or settings."""

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

# How long an example takes is the machine's matter: a test that fails by it says nothing of the code.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

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


@pytest.fixture(scope="session", autouse=True)
def _no_cache_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["MODULAR_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, which this test and the processes that it starts use."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("MODULAR_CACHE_DIR", str(folder))
    return folder
