"""The watch over steps that do not end."""

from __future__ import annotations

import os
from typing import Any

import pytest

from max.serve.worker import _end_when_stalled


class Ended(Exception):
    pass


def test_a_worker_ends_when_a_step_takes_longer_than_it_may(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    class Loop:
        seen = iter([0.0, 0.005, 0.011])

        @property
        def stalled_s(self) -> float:
            return next(self.seen)

    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(os, "_exit", end)
    loop = Loop()
    with pytest.raises(Ended, match="1"):
        _end_when_stalled(loop, 0.01)  # type: ignore[arg-type]
    assert list(loop.seen) == [] and "--decode-stall-timeout-s" in caplog.text
