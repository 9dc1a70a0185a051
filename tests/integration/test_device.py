"""The check of a device, dry: the same code on this host's CPU at a lower level, against its native code."""

from __future__ import annotations

from pathlib import Path

import pytest

from max.bench import random_model
from max.bench.device.__main__ import compare
from max.compiler import Target

pytestmark = pytest.mark.slow
SIZE = {**random_model.SIZES["5m"], "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 640}


@pytest.mark.skipif(not Target.parse("cpu:x86-64-v2").runs_here(), reason="this host is less than x86-64-v2")
def test_a_dry_run_compares_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(random_model.SIZES, "tests", SIZE)
    random_model.write_checkpoint(tmp_path / "model", "tests", seed=0)
    found = compare("cpu:x86-64-v2", tmp_path / "model", tmp_path / "cache", tokens=12, length=32)
    assert (found["target"], found["made_elsewhere"]) == ("cpu:x86-64-v2", False)
    assert found["greedy_tokens_equal"] is True
    assert (found["forced_positions"], found["forced_equal_share"]) == (12, 1.0)
    assert found["tokens_per_second"] > 0 and found["bandwidth_share"] is None
    again = compare("cpu:x86-64-v2", tmp_path / "model", tmp_path / "cache", tokens=4, length=32)
    assert again["artifact"] == found["artifact"] and again["made_elsewhere"] is True
