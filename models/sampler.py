"""The graphs behind a step's logits: `sample_greedy_r{R}` and `sample_full_r{R}` give token ids, `sample_logprobs_r{R}`
their probabilities.

No sort: thresholds of top-k and top-p are found by bisection over the ordered bit patterns of floats, and the token by
the inverse of the cumulative distribution at one uniform number per row. That number comes from Threefry at counter
(position) under key (seed): it depends on nothing else, so that neither the batch nor the kernel changes a draw.
Sources: Threefry-2x32, Salmon et al., SC 2011; top-p, arXiv:1904.09751; min-p, arXiv:2407.01082.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from ..compiler import Graph, Module, TensorType
from ..compiler.sampling import NUMBERS, SETTINGS, TOP_LOGPROBS, mask_words
from . import gpu_kernels, kernels

By = Literal["xla", "cpu", "gpu"]
"""What draws: plain XLA, or the kernels for CPUs or GPUs."""

_LANES = 128  # reductions run over this minor axis, which XLA:CPU vectorizes


def add_samplers(module: Module, rows: int, vocab_size: int, max_batch: int, by: By = "xla") -> None:
    """Adds the samplers of `rows` rows to the module; their ids, (max_batch,), can be `prev_ids` of any next step."""

    def filled(sample: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        return lambda *inputs: jnp.pad(sample(*inputs), (0, max_batch - rows))

    draws: dict[By, tuple[Callable[..., jax.Array], Callable[..., jax.Array]]] = {
        "xla": (filled(sample_greedy), filled(sample_full)),
        "cpu": (filled(kernels.argmax), partial(kernels.sample, num_ids=max_batch)),
        "gpu": (
            partial(gpu_kernels.argmax, num_ids=max_batch),
            partial(sample_full, draw=partial(gpu_kernels.draw, num_ids=max_batch)),
        ),
    }
    greedy, full = draws[by]
    logits = TensorType("float32", (rows, vocab_size))
    Graph(f"sample_greedy_r{rows}", greedy, {"logits": logits}, outputs=("ids",), module=module)
    inputs = {
        "logits": logits,
        "mask": TensorType("int32", (rows, mask_words(vocab_size))),
        "history": TensorType("int32", (max_batch, vocab_size)),
        "bias": TensorType("float32", (max_batch, vocab_size)),
        "settings": TensorType("float32", (rows, len(SETTINGS))),
        "numbers": TensorType("int32", (rows, len(NUMBERS))),
    }
    Graph(f"sample_full_r{rows}", full, inputs, outputs=("ids",), module=module)
    name, inputs = f"sample_logprobs_r{rows}", {"logits": logits, "ids": TensorType("int32", (max_batch,))}
    told = {"xla": logprobs, "cpu": kernels.logprobs, "gpu": gpu_kernels.logprobs}[by]
    outputs = ("chosen", "top_ids", "top")
    Graph(name, partial(told, num_top=min(TOP_LOGPROBS, vocab_size)), inputs, outputs=outputs, module=module)


def sample_greedy(logits: jax.Array) -> jax.Array:
    """The first of the largest, or -1 in a row with a NaN. logits: (R, V) float32; (R,) int32 out."""
    lanes = _lanes(logits, -jnp.inf)
    index = jnp.arange(lanes.shape[1] * _LANES, dtype=jnp.int32).reshape(lanes.shape[1:])
    found = jnp.where(lanes == _peak(lanes), index, jnp.iinfo(jnp.int32).max)
    first = jnp.min(jnp.min(found, axis=1), axis=-1)
    # NaN equals nothing, itself neither.
    return jnp.where(first < logits.shape[1], first, -1)


def draw(logits: jax.Array, settings: jax.Array, numbers: jax.Array, u: jax.Array) -> jax.Array:
    """One token of each row of adjusted logits (R, V), at uniform numbers u (R,); the rest as of `sample_full`."""
    of, number = _columns(settings, numbers)
    greedy = sample_greedy(logits)
    drawn = _draw(logits, of["temperature"], number["top_k"], of["top_p"], of["min_p"], u)
    return jnp.where(of["temperature"] > 0, drawn, greedy)


def sample_full(
    logits: jax.Array,
    mask: jax.Array,
    history: jax.Array,
    bias: jax.Array,
    settings: jax.Array,
    numbers: jax.Array,
    draw: Callable[..., jax.Array] = draw,
) -> jax.Array:
    """Draws one token per row, after penalties, bias, mask, temperature, top-k, top-p and min-p.

    logits:   (R, V) float32
    mask:     (R, V / 32) int32, the tokens that may come, as `mask_words` says
    history:  (B, V) int32, twice the occurrences in the output so far, and one more where the prompt has the token
    bias:     (B, V) float32, added to the logits
    settings: (R, 6) float32, columns SETTINGS; repetition divides or multiplies, the other penalties subtract
    numbers:  (R, 5) int32, columns NUMBERS; `adjusted` says which row of history and bias a row of logits has
    draw:     what takes a token of the adjusted logits
    Returns (R,) int32, -1 where a token that may come has a NaN, or no finite value is there to draw from.
    """
    of, number = _columns(settings, numbers)
    place = jnp.maximum(number["adjusted"], 0)
    is_adjusted = number["adjusted"][:, None] >= 0
    adjusted = jnp.where(is_adjusted, _adjust(logits, history[place], bias[place], of), logits)
    bits = mask[:, :, None] >> jnp.arange(32, dtype=jnp.int32)
    allowed = (bits & 1).reshape(mask.shape[0], -1)[:, : logits.shape[1]] != 0
    seeds = lax.bitcast_convert_type(jnp.stack([number["seed_low"], number["seed_high"]], axis=1), jnp.uint32)
    u = uniform(seeds, number["position"])
    return draw(jnp.where(allowed, adjusted, -jnp.inf), settings, numbers, u)


def _columns(settings: jax.Array, numbers: jax.Array) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Settings and numbers by the names of their columns, (R,) each."""
    return dict(zip(SETTINGS, settings.T, strict=True)), dict(zip(NUMBERS, numbers.T, strict=True))


def _adjust(logits: jax.Array, history: jax.Array, bias: jax.Array, of: dict[str, jax.Array]) -> jax.Array:
    """Penalties, then the bias; all (R, V) but the settings, (R,)."""
    repetition, occurrences = of["repetition_penalty"][:, None], history >> 1
    penalized = jnp.where(logits > 0, logits / repetition, logits * repetition)
    adjusted = jnp.where(history != 0, penalized, logits)
    adjusted -= of["frequency_penalty"][:, None] * occurrences.astype(jnp.float32)
    adjusted -= of["presence_penalty"][:, None] * (occurrences > 0).astype(jnp.float32)
    return adjusted + bias


def logprobs(logits: jax.Array, ids: jax.Array, num_top: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The log-softmax of logits as the model gave them, at each row's id and at its highest values, best first.

    logits: (R, V) float32, of which NaN counts as the lowest number; ids: (B,) int32, of which the first R count,
    and -1, of a row that gave no token, counts as 0
    Returns (R,) float32, and ids (R, num_top) int32 with their values (R, num_top) float32, all finite.
    """
    limit = float(jnp.finfo(jnp.float32).max)
    x = jnp.nan_to_num(logits, nan=-limit, posinf=limit, neginf=-limit)
    lanes = _lanes(x, -jnp.inf)
    peak = _peak(lanes)
    normalizer = jnp.log(_sum(jnp.exp(lanes - peak)))[:, None]

    def normalized(values: jax.Array) -> jax.Array:
        return jnp.maximum(values - peak[:, 0] - normalizer, -limit)

    chosen = jnp.take_along_axis(x, jnp.maximum(ids[: x.shape[0], None], 0), axis=1)
    top, top_ids = lax.top_k(x, num_top)
    return normalized(chosen)[:, 0], top_ids, normalized(top)


def _draw(
    logits: jax.Array, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array, u: jax.Array
) -> jax.Array:
    lanes = _lanes(logits, -jnp.inf)
    kept = _ordered(lanes) >= _top_k_threshold(_ordered(lanes), top_k)[:, None, None]
    # Relative to the peak first: a small temperature then makes the others -inf, and not the peak inf.
    scaled = (lanes - _peak(lanes)) / jnp.where(temperature > 0, temperature, 1.0)[:, None, None]
    weights = jnp.where(kept, jnp.exp(scaled), 0.0)
    nucleus = _top_p_threshold(weights, top_p)
    floor = jnp.maximum(lax.bitcast_convert_type(nucleus, jnp.float32), min_p)
    weights = jnp.where(weights >= floor[:, None, None], weights, 0.0)
    return _inverse_cdf(weights, u)


def _lanes(x: jax.Array, fill: float) -> jax.Array:
    """(R, V) padded and reshaped to (R, V / lanes, lanes)."""
    rows, width = x.shape
    return jnp.pad(x, ((0, 0), (0, -width % _LANES)), constant_values=fill).reshape(rows, -1, _LANES)


def _peak(lanes: jax.Array) -> jax.Array:
    """The largest of each row, (R, 1, 1)."""
    return jnp.max(jnp.max(lanes, axis=1), axis=-1)[:, None, None]


def _ordered(x: jax.Array) -> jax.Array:
    """Floats as int32 of the same order; both zeros are 0."""
    bits = jnp.where(x == 0, 0, lax.bitcast_convert_type(x, jnp.int32))
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _sum(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.sum(x, axis=1), axis=-1)


def _top_k_threshold(keys: jax.Array, top_k: jax.Array) -> jax.Array:
    """The largest key that at least top_k keys reach, per row; the smallest int32 where top_k is 0."""

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1) + ((low ^ high) & 1)  # upper mean without overflow
        enough = _sum((keys >= middle[:, None, None]).astype(jnp.int32)) >= top_k
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    bounds = jnp.iinfo(jnp.int32)
    start = (jnp.full(top_k.shape, bounds.min, jnp.int32), jnp.full(top_k.shape, bounds.max, jnp.int32))
    found = lax.cond(jnp.any(top_k > 0), lambda: lax.fori_loop(0, 32, halve, start)[0], lambda: start[0])
    return jnp.where(top_k > 0, found, bounds.min)


def _top_p_threshold(weights: jax.Array, top_p: jax.Array) -> jax.Array:
    """The bit pattern of the largest weight such that the weights from it upwards make top_p of the sum, per row."""
    wanted = _sum(weights) * top_p
    keys = lax.bitcast_convert_type(weights, jnp.int32)  # weights are not negative: their bits are ordered

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + (high - low + 1) // 2
        enough = _sum(jnp.where(keys >= middle[:, None, None], weights, 0.0)) >= wanted
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    zero = jnp.zeros(top_p.shape, jnp.int32)
    one = jnp.full(top_p.shape, 0x3F800000, jnp.int32)  # the bits of 1.0, which the most likely token weighs
    found = lax.cond(jnp.any(top_p < 1), lambda: lax.fori_loop(0, 31, halve, (zero, one))[0], lambda: zero)
    return jnp.where(top_p < 1, found, zero)


def _inverse_cdf(weights: jax.Array, u: jax.Array) -> jax.Array:
    """The index where the running sum of (R, n, lanes) weights passes u of the total, or -1; u: (R,) in [0, 1)."""
    sums = jnp.sum(weights, axis=-1)
    groups = jnp.cumsum(sums, axis=-1)
    target = u * groups[:, -1]
    group = _first_passing(groups, sums, target)
    before = jnp.where(group > 0, jnp.take_along_axis(groups, jnp.maximum(group - 1, 0)[:, None], axis=1)[:, 0], 0.0)
    lane = jnp.take_along_axis(weights, group[:, None, None], axis=1)[:, 0]
    index = _first_passing(before[:, None] + jnp.cumsum(lane, axis=-1), lane, target)
    # Weights of NaN add up to nothing.
    return jnp.where(groups[:, -1] > 0, group * _LANES + index, -1).astype(jnp.int32)


def _first_passing(running: jax.Array, weights: jax.Array, target: jax.Array) -> jax.Array:
    """The first index with a running sum beyond the target and a weight; all (R, n) but the target, (R,).

    The sums of a parallel scan are rounded each in its own way: they may step over an index without weight, or end
    just short of the target. Then the last index with a weight is meant.
    """
    passed = (running > target[:, None]) & (weights > 0)
    last = weights.shape[1] - 1 - jnp.argmax(weights[:, ::-1] > 0, axis=-1)
    return jnp.where(jnp.any(passed, axis=-1), jnp.argmax(passed, axis=-1), last)


def uniform(seeds: jax.Array, positions: jax.Array) -> jax.Array:
    """One number in [0, 1) per row. seeds: (R, 2) uint32; positions: (R,) int32."""
    word, _ = threefry2x32(seeds[:, 0], seeds[:, 1], positions.astype(jnp.uint32), jnp.zeros_like(seeds[:, 0]))
    return (word >> 8).astype(jnp.float32) * jnp.float32(2**-24)


def threefry2x32(key0: jax.Array, key1: jax.Array, x0: jax.Array, x1: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 with 20 rounds; all uint32 of one shape."""
    keys = (key0, key1, key0 ^ key1 ^ jnp.uint32(0x1BD11BDA))
    x0, x1 = x0 + keys[0], x1 + keys[1]
    rotations = ((13, 15, 26, 6), (17, 29, 16, 24))
    for group in range(5):
        for distance in rotations[group % 2]:
            x0 = x0 + x1
            x1 = ((x1 << distance) | (x1 >> (32 - distance))) ^ x0
        x0 = x0 + keys[(group + 1) % 3]
        x1 = x1 + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return x0, x1
