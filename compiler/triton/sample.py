"""The kernels behind logits: the token of each row, drawn or the most likely, and the highest logits of each row.

A program has a row; programs behind the last one give the zeros that fill a batch.

No sort: the thresholds of top-k and top-p are found from their highest bits down, two bits in each pass over the row,
and the token where the running sum of weights passes one uniform number. It is the definition of models/sampler.py.
A pass reads the row from the second-level cache; passes that a row's settings make needless run zero times.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..graph import TensorType
from ..sampling import NUMBERS, SETTINGS
from . import operations as op
from .block import Block, Dtype
from .kernel import Kernel, build

_LOG2_E = math.log2(math.e)
_BITS = 2  # of a threshold that a pass finds: three counts; more would make passes fewer and each as much slower
_KEY_BITS, _WEIGHT_BITS = 32, 30  # a weight is at most 1.0, whose bits are 0x3F800000
_SIGN, _REST = -(2**31), 2**31 - 1
_LARGEST = 3.4028234663852886e38  # of float32
_MAX_LANES, _LANES_PER_WARP = 8192, 256  # the elements that a program looks at together; two loads of a thread at once


@dataclass(frozen=True)
class _Row:
    """A row of logits, as it is gone through: `lanes` elements at a time."""

    start: Block
    width: int

    @property
    def lanes(self) -> int:
        return _lanes(self.width)

    def part(self, i: Block) -> tuple[Block, Block]:
        """The i-th elements and their indices, both (lanes,); -inf behind the end."""
        index = i * self.lanes + op.arange(self.lanes)
        return op.load(self.start + index, index < self.width, -math.inf), index

    def go(
        self, carry: Sequence[Block], visit: Callable[..., Sequence[Block]], only_if: Block | None = None
    ) -> list[Block]:
        """Carries what `visit(elements, indices, *carry)` gives over the row, or leaves it where `only_if` is false."""
        turns = op.constant(-(-self.width // self.lanes))
        if only_if is not None:
            turns = op.where(only_if, turns, 0)
        return op.loop(op.constant(0), turns, carry, lambda i, *now: visit(*self.part(i), *now))

    def full(self, number: float, dtype: Dtype) -> Block:
        return op.full((self.lanes,), number, dtype)


def _lanes(width: int) -> int:
    return min(_MAX_LANES, 1 << (width - 1).bit_length())


def _warps(width: int) -> int:
    return max(1, _lanes(width) // _LANES_PER_WARP)


@dataclass(frozen=True)
class _Draw:
    """The weight of each element of a row in a draw; the largest is 1."""

    row: _Row
    peak: Block
    temperature: Block

    def weights(self, x: Block, least_key: Block) -> Block:
        """exp((x - peak) / temperature), or 0 for elements whose key is below."""
        # Relative to the peak first: a small temperature then makes the others -inf, and not the peak inf.
        weights = op.exp2((x - self.peak) / self.temperature * _LOG2_E)
        return op.where(_keys(x) >= least_key, weights, 0.0)


@functools.cache
def argmax_kernel(logits: TensorType, num_ids: int) -> Kernel:
    """The first of the largest of each row of logits (R, V) float32, or -1 where one is NaN; (num_ids,) int32."""
    rows, width = logits.shape

    def body(logits_at: Block, out_at: Block) -> None:
        is_row, place = op.program_id(0) < rows, op.minimum(op.program_id(0), rows - 1)
        row = _Row(logits_at + place.to("int64") * width, width)
        op.store(out_at + op.program_id(0), op.where(is_row, _first(row, _peak(row, is_row), is_row), 0))

    ids = TensorType("int32", (num_ids,))
    return build("argmax", [logits], [ids], body, grid=(num_ids, 1, 1), num_warps=_warps(width))


@functools.cache
def sample_kernel(logits: TensorType, num_ids: int) -> Kernel:
    """Draws a token of each row of adjusted logits (R, V) float32; -inf ones never come.

    Operands: logits; settings (R, 6) float32 and numbers (R, 5) int32, columns SETTINGS and NUMBERS; uniform numbers
    (R,) float32 in [0, 1). Result: (num_ids,) int32, -1 where a logit is NaN or there is no finite one to draw.
    """
    rows, width = logits.shape

    def body(logits_at: Block, settings_at: Block, numbers_at: Block, u_at: Block, out_at: Block) -> None:
        is_row, place = op.program_id(0) < rows, op.minimum(op.program_id(0), rows - 1)
        temperature, top_p, min_p = (
            op.load(settings_at + (place * len(SETTINGS) + SETTINGS.index(name)))
            for name in ("temperature", "top_p", "min_p")
        )
        top_k = op.load(numbers_at + (place * len(NUMBERS) + NUMBERS.index("top_k")))
        row = _Row(logits_at + place.to("int64") * width, width)
        peak, is_drawn = _peak(row, is_row), is_row & (temperature > 0)
        greedy = _first(row, peak, is_row & (temperature <= 0))
        draw = _Draw(row, peak, op.where(is_drawn, temperature, 1.0))
        least_key = _top_k_key(row, top_k, is_drawn & (top_k > 0))
        least_weight = op.maximum(_top_p_weight(draw, least_key, top_p, is_drawn & (top_p < 1)), min_p)
        drawn = _inverse_cdf(draw, least_key, least_weight, op.load(u_at + place), is_drawn)
        op.store(out_at + op.program_id(0), op.where(is_row, op.where(is_drawn, drawn, greedy), 0))

    operands = [
        logits, TensorType("float32", (rows, len(SETTINGS))), TensorType("int32", (rows, len(NUMBERS))),
        TensorType("float32", (rows,)),
    ]  # fmt: skip
    ids = TensorType("int32", (num_ids,))
    return build("sample", operands, [ids], body, grid=(num_ids, 1, 1), num_warps=_warps(width))


def _keys(x: Block) -> Block:
    """Floats as int32 of the same order; both zeros are 0."""
    bits = op.where((x < 0) | (x > 0), x, 0.0).bits("int32")
    return op.where(bits < 0, bits ^ _REST, bits)


def _top_k_key(row: _Row, top_k: Block, only_if: Block) -> Block:
    """The largest key that at least top_k keys reach; the smallest int32 where it is not asked for."""

    def narrow(found: Block, shift: Block) -> list[Block]:
        steps = _steps(found, shift)

        def count(x: Block, _: Block, *counts: Block) -> list[Block]:
            keys, one = _keys(x), op.constant(1)
            each = zip(counts, steps, strict=True)
            return [so_far + op.where(keys >= (least ^ _SIGN), one, 0) for so_far, least in each]

        counts = row.go([row.full(0, "int32")] * len(steps), count)
        return _last_of(found, steps, [so_far.sum(0) >= top_k for so_far in counts])

    # Found without a sign, from the smallest upwards.
    return _highest_bits_first(_KEY_BITS, narrow, only_if) ^ _SIGN


def _top_p_weight(draw: _Draw, least_key: Block, top_p: Block, only_if: Block) -> Block:
    """The largest weight such that the weights from it upwards make top_p of their sum; 0 where it is not asked for."""

    def add(x: Block, _: Block, total: Block) -> list[Block]:
        return [total + draw.weights(x, least_key)]

    row = draw.row
    (total,) = row.go([row.full(0, "float32")], add, only_if)
    wanted = total.sum(0) * top_p

    def narrow(found: Block, shift: Block) -> list[Block]:
        steps = _steps(found, shift)

        def add(x: Block, _: Block, *sums: Block) -> list[Block]:
            weights = draw.weights(x, least_key)
            each = zip(sums, steps, strict=True)
            return [so_far + op.where(weights >= least.bits("float32"), weights, 0.0) for so_far, least in each]

        sums = row.go([row.full(0, "float32")] * len(steps), add)
        return _last_of(found, steps, [so_far.sum(0) >= wanted for so_far in sums])

    # Of a top_p of 0 the most likely token is left, which weighs 1.
    return op.minimum(_highest_bits_first(_WEIGHT_BITS, narrow, only_if).bits("float32"), 1.0)


def _highest_bits_first(width: int, narrow: Callable[[Block, Block], Sequence[Block]], only_if: Block) -> Block:
    """An int32 of `width` bits, from `narrow(bits so far, place of the next ones)`; 0 where `only_if` is false."""

    def turn(i: Block, found: Block) -> Sequence[Block]:
        return narrow(found, (width - _BITS) - i * _BITS)

    turns = op.where(only_if, op.constant(width // _BITS), 0)
    return op.loop(op.constant(0), turns, [op.constant(0)], turn)[0]


def _steps(found: Block, shift: Block) -> list[Block]:
    """The values that the next bits can make of those found so far, but for no change."""
    return [found | (op.constant(bits) << shift) for bits in range(1, 1 << _BITS)]


def _last_of(found: Block, steps: Sequence[Block], holds: Sequence[Block]) -> list[Block]:
    """The last of ascending steps that holds, or what is found already."""
    for step, is_it in zip(steps, holds, strict=True):
        found = op.where(is_it, step, found)
    return [found]


def _peak(row: _Row, only_if: Block) -> Block:
    """The largest of a row, or NaN where one is."""
    (peaks,) = row.go([row.full(-math.inf, "float32")], lambda x, _, peaks: [op.maximum(peaks, x)], only_if)
    return peaks.max(0)


def _first(row: _Row, peak: Block, only_if: Block) -> Block:
    """The first index of the largest, or -1 where that is NaN."""
    none = row.full(_REST, "int32")
    (found,) = row.go([none], lambda x, index, found: [op.minimum(found, op.where(x >= peak, index, none))], only_if)
    first = found.min(0)
    return op.where(first < row.width, first, -1)


def _inverse_cdf(draw: _Draw, least_key: Block, least_weight: Block, u: Block, only_if: Block) -> Block:
    """The index where the running sum of weights passes u of the total, or -1 where there is none to draw from."""
    row = draw.row

    def kept(x: Block) -> Block:
        weights = draw.weights(x, least_key)
        return op.where(weights >= least_weight, weights, 0.0)

    # Both passes add up the same parts in the same order, so that the second passes the target where the total does.
    zero = op.constant(0, "float32")
    (total,) = row.go([zero], lambda x, _, total: [total + kept(x).sum(0)], only_if)
    target = total * u

    def look(x: Block, index: Block, running: Block, before: Block, part: Block) -> list[Block]:
        after = running + kept(x).sum(0)
        is_here = (running <= target) & (after > target)
        return [after, op.where(is_here, running, before), op.where(is_here, index.min(0) // row.lanes, part)]

    _, before, part = row.go([zero, zero, op.constant(0)], look, only_if)
    x, _ = row.part(part)
    weights, lane = kept(x), op.arange(row.lanes)

    def turn(i: Block, found: Block) -> list[Block]:
        more = found | (op.constant(row.lanes // 2) >> i)
        return [op.where(before + op.where(lane < more, weights, 0.0).sum(0) <= target, more, found)]

    # How many elements of the part may come before the sum passes; with one more it does, so that one has a weight.
    turns = row.lanes.bit_length() - 1
    (count,) = op.loop(op.constant(0), op.where(only_if, op.constant(turns), 0), [op.constant(0)], turn)
    return op.where(total > 0, part * row.lanes + count, -1)


@functools.cache
def highest_kernel(logits: TensorType, num_ids: int, num_top: int) -> Kernel:
    """The highest logits of each row of (R, V) float32, the first of equal ones first, and what probabilities take.

    NaN counts as the lowest number, and infinite logits as the lowest and the largest. Operands: logits; ids (B,)
    int32, of which the first R count, and -1 counts as 0. Results: top_ids (R, num_top) int32; top (R, num_top), the
    logits at ids (R,), and the sums of exp(logit - highest) (R,), all float32.
    """
    rows, width = logits.shape

    def body(
        logits_at: Block, ids_at: Block, top_ids_at: Block, top_at: Block, chosen_at: Block, sum_at: Block
    ) -> None:
        place = op.program_id(0)
        row = _Row(logits_at + place.to("int64") * width, width)

        def values(x: Block, index: Block) -> Block:
            """Finite ones, and -inf behind the end."""
            number = op.where(x <= math.inf, x, -_LARGEST)
            return op.where(index < width, op.minimum(op.maximum(number, -_LARGEST), _LARGEST), -math.inf)

        def best(i: Block, last: Block, last_at: Block) -> list[Block]:
            """The first of the highest behind the last one found."""

            def better(x: Block, index: Block, highest: Block, at: Block) -> list[Block]:
                x = values(x, index)
                is_better = ((x < last) | ((x <= last) & (index > last_at))) & (x > highest)
                return [op.where(is_better, x, highest), op.where(is_better, index, at)]

            lanes, lanes_at = row.go([row.full(-math.inf, "float32"), row.full(_REST, "int32")], better)
            highest = lanes.max(0)
            at = op.where(lanes >= highest, lanes_at, _REST).min(0)
            op.store(top_at + (place * num_top + i), highest)
            op.store(top_ids_at + (place * num_top + i), at)
            return [highest, at]

        op.loop(op.constant(0), op.constant(num_top), [op.constant(math.inf, "float32"), op.constant(-1)], best)
        (peaks,) = row.go([row.full(-math.inf, "float32")], lambda x, at, peaks: [op.maximum(peaks, values(x, at))])
        peak = peaks.max(0)

        def add(x: Block, index: Block, total: Block) -> list[Block]:
            return [total + op.exp2((values(x, index) - peak) * _LOG2_E)]

        (total,) = row.go([row.full(0, "float32")], add)
        op.store(sum_at + place, total.sum(0))
        id = op.maximum(op.load(ids_at + place), 0)
        op.store(chosen_at + place, values(op.load(row.start + id), id))

    each, highest = TensorType("float32", (rows,)), (rows, num_top)
    results = [TensorType("int32", highest), TensorType("float32", highest), each, each]
    operands = [logits, TensorType("int32", (num_ids,))]
    return build("highest", operands, results, body, grid=(rows, 1, 1), num_warps=_warps(width))
