"""The cache section: which folder is in force, and sizes as people write them."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from max import ConfigError
from max.cache.config import CacheConfig


def test_the_setting_wins_over_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MODULAR_CACHE_DIR", "/elsewhere")
    assert CacheConfig(cache_dir=tmp_path).folder == tmp_path


def test_the_environment_in_its_order(monkeypatch):
    monkeypatch.setenv("MODULAR_CACHE_DIR", "/first")
    monkeypatch.setenv("XDG_CACHE_HOME", "/second")
    monkeypatch.setenv("HOME", "/third")
    assert CacheConfig().folder == Path("/first")
    monkeypatch.delenv("MODULAR_CACHE_DIR")
    assert CacheConfig().folder == Path("/second/max")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert CacheConfig().folder == Path("/third/.cache/max")


def test_a_home_folder_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/third")
    assert CacheConfig(cache_dir=Path("~/mine")).folder == Path("/third/mine")


def test_a_user_without_a_home_is_told(monkeypatch):
    with pytest.raises(ConfigError, match="no home folder is known") as refused:
        CacheConfig(cache_dir=Path("~nobody-of-that-name/cache")).folder  # noqa: B018
    assert "--cache-dir" in refused.value.hint


@pytest.mark.parametrize(
    ("written", "bytes_"), [("20GB", 20 * 10**9), ("1 GiB", 1 << 30), ("512", 512), (4096, 4096), ("1.5KB", 1500)]
)
def test_sizes_as_people_write_them(written, bytes_):
    assert CacheConfig(max_cache_size=written).max_cache_size == bytes_


@pytest.mark.parametrize(
    "given",
    [{"max_cache_size": "much"}, {"max_cache_size": 0}, {"max_cache_size": -5}, {"cache_policy": "maybe"}],
)
def test_refuses_nonsense(given):
    with pytest.raises(ValidationError):
        CacheConfig(**given)
