"""Stores in a temporary folder, and small artifacts to put into them."""

import io
from pathlib import Path

import pytest
from pydantic import ByteSize

from max.cache import mef
from max.cache.config import CacheConfig, CachePolicy
from max.cache.store import Store


@pytest.fixture
def open_store(tmp_path):
    """A function that opens a store on one folder, as another process would."""

    def opener(policy: CachePolicy = "on", root: Path = tmp_path / "cache", size: int = 10**9) -> Store:
        return Store.open(CacheConfig(cache_dir=root, cache_policy=policy, max_cache_size=ByteSize(size)))

    return opener


@pytest.fixture
def make_artifact():
    """A function that gives the bytes of a small artifact; each text and size makes another one."""

    def maker(text: str = "module", size: int = 0) -> bytes:
        file = io.BytesIO()
        with mef.MefWriter(file) as writer:
            writer.add(mef.MODULE, "text", text.encode(), codec="none")
            if size:
                writer.add(mef.NATIVE, "step", bytes(size), codec="none")
            writer.finish()
        return file.getvalue()

    return maker
