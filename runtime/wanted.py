"""What an artifact is asked for by: the factors of its key, and the sizes of its graphs."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .. import ConfigError
from ..cache.key import Key
from ..compiler import Target
from ..compiler.limits import Limits, PageFormat, choose_limits, default_length
from ..compiler.weights import WeightTable
from .config import BatchConfig, ModelConfig
from .device_memory import check_fits, memory_budgets, room_for_pages

if TYPE_CHECKING:
    from ..models.table import Config

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """What an artifact is asked for by: its key, and what it is made from."""

    key: Key
    architecture: str
    config: Config
    limits: Limits
    weights: WeightTable


def limits_of(
    config: Config,
    model: ModelConfig,
    batch: BatchConfig,
    target: Target,
    weights: WeightTable,
    page_format: PageFormat,
) -> Limits:
    """The sizes that the settings ask for; raises ConfigError for a context longer than the model was made for, and
    for what the device has no memory for."""
    page_tokens = batch.kv_cache_page_size
    part = config.part(target.devices)
    page_bytes = sum(group.page_bytes for group in part.cache_groups(page_tokens, page_format))
    max_length = _max_length(config, model, page_tokens, page_bytes)
    *smaller, last = memory_budgets(target, batch.device_memory_utilization) or (None,)

    def limits_within(budget: int | None) -> Limits:
        room = budget and room_for_pages(
            budget,
            target,
            weights,
            tokens=batch.max_batch_input_tokens,
            rows=batch.max_batch_size,
            vocab_size=config.vocab_size,
        )
        limits = choose_limits(
            max_length=max_length,
            max_batch=batch.max_batch_size,
            page_tokens=page_tokens,
            max_step_tokens=batch.max_batch_input_tokens,
            page_bytes=page_bytes,
            total_tokens=batch.max_batch_total_tokens,
            pool_bytes=room,
            page_format=page_format,
            smallest_step=target.smallest_step,
            lone_rows=target.platform == "cpu",
        )
        if room is not None:
            check_fits(limits, page_bytes, room, target)
        return limits

    for budget in smaller:
        with suppress(ConfigError):  # the next one has room for more
            return limits_within(budget)
    return limits_within(last)


def _max_length(config: Config, model: ModelConfig, page_tokens: int, page_bytes: int) -> int:
    """Tokens of a row, as asked for or by default."""
    wanted = model.max_length or default_length(config.max_position, page_tokens, page_bytes)
    if model.max_length is None and wanted < config.max_position:
        logger.warning(
            "the context is limited to %d tokens, which take 1 GB of pages; --max-length %d asks for all that "
            "the model was made for",
            wanted,
            config.max_position,
        )
    if wanted > config.max_position:
        raise ConfigError(
            f"--max-length {wanted} is more than the {config.max_position} tokens that the model was made for",
            f"Give at most {config.max_position}.",
        )
    return wanted
