"""What the check of a device feeds to a step, and the table of targets; tests/integration/test_device.py runs it."""

from __future__ import annotations

import numpy as np

from max.bench import targets
from max.bench.device.walk import Walk, forced, greedy
from max.compiler.limits import Limits
from max.compiler.targets.listing import target_rows

LIMITS = Limits(max_length=32, max_batch=8, page_tokens=4, num_pages=9, token_buckets=(8, 16))


class Counting:
    """A step whose likeliest token after `t` is `t + 1`, and that checks what it is given."""

    input_metadata: tuple

    def __init__(self) -> None:
        names = "tokens token_src prev_ids positions rows slots page_table lengths logit_rows"
        self.input_metadata = tuple(type("Spec", (), {"name": name}) for name in names.split())
        self.seen = 0

    def __call__(self, *values: np.ndarray) -> list[np.ndarray]:
        given = dict(zip((spec.name for spec in self.input_metadata), values, strict=True))
        count = int((given["rows"] == 0).sum())
        assert given["positions"][:count].tolist() == list(range(self.seen, self.seen + count))
        slots = given["slots"]
        assert slots[:count].tolist() == [4 + position for position in given["positions"][:count]]
        assert slots[count:].tolist() == [0] * (8 - count), "padding writes to page 0"
        self.seen += count
        assert given["lengths"].tolist() == [self.seen, *[0] * 7]
        chosen = given["tokens"][given["logit_rows"]]
        return [np.eye(100, dtype=np.float32)[chosen + 1]]


def test_a_walk_feeds_every_token_once_and_in_its_place() -> None:
    walk = Walk({"step_t8_r8": Counting()}, LIMITS)  # type: ignore[dict-item]
    assert greedy(walk, [3, 4, 5], 4) == [6, 7, 8, 9]
    assert walk.length == 6 and len(walk.seconds) == 4
    text = list(range(20))
    assert forced(Walk({"step_t8_r8": Counting()}, LIMITS), text) == [token + 1 for token in text]  # type: ignore[dict-item]


def test_the_table_of_targets_has_a_line_for_each() -> None:
    measured = targets.Measured(20.04, 0.361, 35, 2_900_000, 3_210_000)
    rows = {row.target: targets.line(row, measured) for row in target_rows()}
    assert rows["cuda:sm_90"] == "| `cuda:sm_90` | NVIDIA H200 | 20.0 | 0.36 | 35 | 2.9 | 3.2 |"
