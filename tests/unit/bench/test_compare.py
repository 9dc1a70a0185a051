"""The command that compares engines: what it finds before it takes minutes and gigabytes."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner

from max.bench.compare import main


def test_peers_that_are_not_there_are_told_before_models_are_written(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["--peers", str(tmp_path), "--encodings", "q8_0", "--cells", "b1"])
    assert done.exit_code == 1 and "bin/python\nMake the environments of the peers" in done.output
    assert not list(tmp_path.iterdir())
