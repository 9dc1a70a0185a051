"""The parts of weights that devices share: equal shares of every source, which together are the whole."""

from __future__ import annotations

import numpy as np
import pytest

from max.compiler.weights import Weight, WeightTable
from max.models.llama_config import Config
from max.models.rope import Rope

CONFIG = Config(48, 8, 16, 3, 4, 2, 4, 1e-5, 64, Rope(4, 10000.0), attention_bias=True, mlp_bias=True)


def filled(weight: Weight) -> np.ndarray:
    return np.arange(np.prod(weight.stored_shape), dtype=np.float32).reshape(weight.stored_shape)


@pytest.mark.parametrize("by_output", [True, False])
def test_each_device_has_its_heads_columns_and_rows(by_output: bool) -> None:
    table = CONFIG.weights().split(CONFIG.sharding(2))
    table = WeightTable.from_json((table.by_output() if by_output else table).to_json())
    for weight in table.weights:
        whole = filled(weight)
        parts = [weight.part(whole, device, 2) for device in range(2)]
        assert {part.shape for part in parts} == {weight.part_shape(2)}
        name = weight.name.rpartition(".")[2]
        if name in ("input_norm", "post_norm", "norm", "o_bias", "down_bias"):
            assert not weight.split and parts[0] is whole
            continue
        axis = {"outputs": -2 if weight.by_output or name == "embed" else -1, "inputs": -1 if by_output else -2}
        at = axis[weight.split] if whole.ndim > 1 else -1
        widths = weight.widths if weight.split == "outputs" and weight.widths else (whole.shape[at],)
        for device, part in enumerate(parts):
            shares = [np.split(source, 2, at)[device] for source in np.split(whole, np.cumsum(widths)[:-1], axis=at)]
            np.testing.assert_array_equal(part, np.concatenate(shares, at))


def test_one_device_has_the_array_itself() -> None:
    weight = CONFIG.weights().split(CONFIG.sharding(1)).weights[0]
    whole = filled(weight)
    assert weight.part(whole, 0, 1) is whole and weight.part_shape(1) == whole.shape
