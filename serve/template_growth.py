"""Measures what an operator, method or filter of a template would build, before it is built."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence, Sized
from typing import Any

MAX_SIZE = 4 * 1024 * 1024
_MAX_BITS = 4096
_ITEM_WEIGHT = 32
_LONG_GENERATOR = 10_000
# A width of four digits, or one that is taken from an argument: as printf writes it, and as str.format does.
_WIDE_PERCENT = re.compile(r"%(\([^)]*\))?[-+ #0]*(\*|\d{4,}|\d*\.(\*|\d{4,}))")
_WIDE_BRACES = re.compile(r"\{[^{}]*:[^{}]*(\{|\d{4,})")


class LimitExceeded(Exception):
    """The template ran into a limit; the message says which, beginning with "it"."""


def check_size(value: Any) -> None:
    """Raises LimitExceeded when printing `value`, nested lists and mappings included, gives too much text."""
    size = 0
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            _check(size := size + len(item))
        elif isinstance(item, (list, tuple, set, frozenset)):
            _check(size := size + len(item))
            stack.extend(item)
        elif isinstance(item, dict):
            _check(size := size + len(item))
            stack.extend(item)
            stack.extend(item.values())
        else:
            size += 1


def check_operator(operator: str, left: Any, right: Any) -> None:
    """Raises LimitExceeded when `left operator right` (+ * ** % format) gives something huge."""
    if operator in ("%", "format") and isinstance(left, str):
        if _WIDE_PERCENT.search(left) if operator == "%" else _WIDE_BRACES.search(left):
            raise LimitExceeded("it formats text to a width of more than 999")
        check_size(right)
    elif operator == "+":
        _check(_length(left) + _length(right))
    elif operator == "*":
        _check_product(left, right)
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() * abs(right))


def check_method(method: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Raises LimitExceeded when calling `method`, of text, gives something huge; other callables pass."""
    owner = getattr(method, "__self__", None)
    if not isinstance(owner, str):
        return
    name = method.__name__
    if name == "translate":
        raise LimitExceeded("it calls str.translate, which has no bound")
    if measure := _TEXT_GROWTH.get(name):
        _check(measure(owner, *args, *kwargs.values()))


def check_filter(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Raises LimitExceeded when the filter `name`, given a value and its arguments, gives something huge."""
    if not args:
        return
    value, *rest = args
    rest += kwargs.values()
    if name == "format":
        check_operator("%", str(value), rest)
    elif name in ("string", "tojson", "pprint", "urlencode", "xmlattr"):
        check_size(value)
        _check_numbers(rest, 64)
    elif name in ("indent", "wordwrap") and isinstance(value, str):
        _check(len(value.splitlines()) * max(map(_amount, rest), default=0))
        _check(len(value) * max(map(_length, rest), default=0))
    elif name == "sum":
        if any(isinstance(item, (list, tuple, str)) for item in rest):
            raise LimitExceeded("it sums up what is not a number")
    elif name in ("replace", "join"):
        _check(_TEXT_GROWTH["replace"](str(value), *rest) if name == "replace" else _joined(value, rest))
    else:
        _check_numbers(rest, 100_000)


def _joined(items: Any, rest: Sequence[Any]) -> int:
    check_size(items)
    num_items = len(items) if isinstance(items, Sized) else _LONG_GENERATOR
    return num_items * _length(rest[0] if rest else "")


def _replaced(text: str, old: Any = "", new: Any = "", *_: Any) -> int:
    return len(text) + text.count(str(old)) * len(str(new))


_TEXT_GROWTH: dict[str, Callable[..., int]] = {
    "center": lambda text, *args: max(map(_amount, args), default=0),
    "ljust": lambda text, *args: max(map(_amount, args), default=0),
    "rjust": lambda text, *args: max(map(_amount, args), default=0),
    "zfill": lambda text, *args: max(map(_amount, args), default=0),
    "expandtabs": lambda text, *args: len(text) * max(map(_amount, args), default=8),
    "replace": _replaced,
    "join": lambda text, *args: _joined(args[0] if args else (), [text]),
}


def _check_product(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
    elif isinstance(right, int):
        _check(_length(left) * right)
    elif isinstance(left, int):
        _check(_length(right) * left)


def _check_numbers(values: Sequence[Any], largest: int) -> None:
    if any(_amount(value) > largest for value in values):
        raise LimitExceeded(f"it asks for a count or width of more than {largest:,}")


def _check_bits(bits: int) -> None:
    if bits > _MAX_BITS:
        raise LimitExceeded(f"it computes a number of more than {_MAX_BITS:,} bits")


def _check(size: int) -> None:
    if size > MAX_SIZE:
        raise LimitExceeded(f"it builds a value of more than {MAX_SIZE:,} characters or items")


def _length(value: Any) -> int:
    """Characters of a text; of a collection, what its items weigh."""
    if isinstance(value, str):
        return len(value)
    return len(value) * _ITEM_WEIGHT if isinstance(value, Sized) else 0


def _amount(value: Any) -> int:
    return abs(value) if isinstance(value, int) else 0
