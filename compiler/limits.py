"""The sizes that a text pipeline is compiled for: constants of its graphs and factors of its key. Imports no jax."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

_POOL_BYTES = 256 << 20  # pages of the default pool on CPU, unless one row of full length needs more

_MOST_PAGES = 1 << 16  # of a pool that fills a device: more than requests can use, and bookkeeping stays short

_ROW_BYTES = 1 << 30  # pages of one row at the default length: no surprise when a model was made for 128k tokens


DEFAULT_UTILIZATION = 0.9
"""The share of a device's memory that a process takes."""

NEW_PAGES = "new_pages"
"""The graph that makes the pages of a text pipeline, where it has one; its outputs have the names of the state."""

PageFormat = Literal["float32", "bfloat16"]
"""What keys and values are kept in; scores and sums are float32 in any case."""


@dataclass(frozen=True)
class CacheGroup:
    """Layers whose keys and values are kept alike; `page_bytes` is of one page over all of them."""

    kind: Literal["full"]
    layers: tuple[int, ...]
    page_tokens: int
    page_bytes: int


def page_bytes(layers: int, kv_width: int, page_tokens: int, page_format: PageFormat) -> int:
    """The bytes of a page of keys and values over some layers, each of `kv_width` elements per token."""
    return layers * 2 * kv_width * page_tokens * {"float32": 4, "bfloat16": 2}[page_format]


@dataclass(frozen=True)
class Limits:
    """All counts are per engine; page 0 belongs to no row and takes the writes of padding tokens.

    token_buckets: tokens per step, ascending; the last one is the largest prefill chunk
    lone_rows:     whether large steps are also made for a single row of logits: where a row of the head takes time
    """

    max_length: int
    max_batch: int
    page_tokens: int
    num_pages: int
    token_buckets: tuple[int, ...]
    page_format: PageFormat = "float32"
    lone_rows: bool = True

    @property
    def max_pages(self) -> int:
        """Pages of one row of full length."""
        return -(-self.max_length // self.page_tokens)

    def logit_rows(self, tokens: int) -> tuple[int, ...]:
        """How many rows of logits a step of this many tokens can give: lone prompts should not pay for a full batch."""
        if tokens <= self.max_batch:
            return (tokens,)
        return tuple(sorted({1, self.max_batch})) if self.lone_rows else (self.max_batch,)

    @property
    def row_buckets(self) -> tuple[int, ...]:
        """Every number of rows that some step gives to the samplers, ascending."""
        return tuple(sorted({rows for tokens in self.token_buckets for rows in self.logit_rows(tokens)}))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> Limits:
        return Limits(**{**value, "token_buckets": tuple(value["token_buckets"])})


def default_length(trained: int, page_tokens: int, page_bytes: int) -> int:
    """The context of a model made for `trained` tokens: all of them, or as many as 1 GiB of pages hold.

    The same on every host, since it is a factor of the key; a longer one has to be asked for.
    """
    return min(trained, max(_ROW_BYTES // page_bytes, 1) * page_tokens)


def choose_limits(
    *,
    max_length: int,
    max_batch: int,
    page_tokens: int,
    max_step_tokens: int,
    page_bytes: int,
    total_tokens: int | None = None,
    pool_bytes: int | None = None,
    smallest_step: int = 1,
    page_format: PageFormat = "float32",
    lone_rows: bool = True,
) -> Limits:
    """Sizes the pool and the buckets.

    page_bytes:   bytes of one page over all layers
    smallest_step: tokens of the smallest bucket, a power of two
    total_tokens: tokens that the pool must hold; by default what 256 MiB hold, but at least one row of full length
                  and at most a full batch of such rows. Rounded up to few sizes.
    pool_bytes:   what the pool may fill where no tokens are asked for; at least a row of full length is taken
    """
    row_pages = -(-max_length // page_tokens)
    if total_tokens is None and pool_bytes is not None:
        pages = max(_few_sizes(min(pool_bytes // page_bytes - 1, _MOST_PAGES), up=False), row_pages)
    elif total_tokens is None:
        wanted = min(max(_POOL_BYTES // page_bytes, row_pages), row_pages * max_batch)
        # A power of two may overshoot what a full batch can ever use.
        pages = min(_power_of_two(wanted), row_pages * max_batch)
    else:
        pages = _few_sizes(max(-(-total_tokens // page_tokens), row_pages), up=True)
    return Limits(
        max_length,
        max_batch,
        page_tokens,
        pages + 1,
        _buckets(smallest_step, min(max_step_tokens, max_length), max_batch),
        page_format,
        lone_rows,
    )


def _power_of_two(least: int) -> int:
    return 1 << max(least - 1, 0).bit_length()


def _few_sizes(pages: int, *, up: bool) -> int:
    """The next of 16 sizes between each power of two and the next: much the same memory gives the same key."""
    step = 1 << max(pages.bit_length() - 5, 0) if pages > 0 else 1
    return -(-pages // step) * step if up else pages // step * step


def _buckets(smallest: int, largest: int, max_batch: int) -> tuple[int, ...]:
    """Powers of two up to the first that holds both a full chunk and a full decode batch."""
    buckets = [smallest]
    while buckets[-1] < max(largest, max_batch):
        buckets.append(buckets[-1] * 2)
    return tuple(buckets)
