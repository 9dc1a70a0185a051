"""What is checked before an engine takes its memory."""

import pytest

from max import CapacityError
from max.runtime.model import TensorSpec
from max.runtime.text_engine import check_memory


def test_pages_that_this_machine_cannot_hold_are_refused() -> None:
    with pytest.raises(CapacityError, match=r"take 140,737\.5 GB"):
        check_memory([TensorSpec("keys", "float32", (1 << 44,)), TensorSpec("values", "bfloat16", (1 << 45,))])
    check_memory([TensorSpec("keys", "float32", (1 << 10,))])
