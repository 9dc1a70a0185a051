"""A Jinja sandbox with a meter: a template that loops, counts or grows without end is stopped.

On top of Jinja's immutable sandbox (no underscore attributes, no mutation, range() of at most 100,000), every loop
step, call, operator and printed value looks at the clock, and what could build something huge is measured first.
Templates come with a checkpoint or from the operator, never from a request.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jinja2 import Template, nodes, pass_context
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from .template_growth import LimitExceeded, check_filter, check_method, check_operator, check_size

MAX_OUTPUT_CHARS = 2 * 1024 * 1024
_STEPS_PER_LOOK = 32


class _Meter:
    """Time and output used by one rendering."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._deadline = time.monotonic() + limit_s
        self._steps = 0
        self._chars = 0

    def step(self) -> None:
        self._steps += 1
        if self._steps % _STEPS_PER_LOOK == 0 and time.monotonic() > self._deadline:
            raise LimitExceeded(f"it takes longer than {self._limit_s:g} s")

    def add_output(self, chars: int) -> None:
        self.step()
        self._chars += chars
        # Text that a macro or block captures counts again where it is printed, hence the factor.
        if self._chars > 4 * MAX_OUTPUT_CHARS:
            raise LimitExceeded(f"it writes more than {MAX_OUTPUT_CHARS:,} characters")


_meter: ContextVar[_Meter] = ContextVar("chat_template_meter")


@contextmanager
def metered(limit_s: float) -> Iterator[None]:
    """Gives the templates rendered inside `limit_s` seconds and the output limit; they raise LimitExceeded."""
    token = _meter.set(_Meter(limit_s))
    try:
        yield
    finally:
        _meter.reset(token)


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox in which every step of a template goes through the meter; render inside `metered`."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=_print, **options)
        self.filters = {name: _guarded(name, function) for name, function in self.filters.items()}
        self.filters["_each_metered"] = _each
        self.filters["_concatenated"] = _concatenate
        del self.globals["lipsum"]

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Adds a filter, guarded as the built-in ones are."""
        self.filters[name] = _guarded(name, function)

    def limited(self, source: str) -> Template:
        """Compiles `source`; raises jinja2.TemplateSyntaxError."""
        return self.from_string(_Metering().visit(self.parse(source)))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _meter.get().step()
        check_method(__obj, args, kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _meter.get().step()
        check_operator(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            check_operator("format", value.__self__, ())
        return wrapped


class _Metering(NodeTransformer):
    """Rewrites a template so that loops, `~` and plain text pass through the meter too."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "_each_metered", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        operands = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(operands, "_concatenated", [], [], None, None, lineno=node.lineno)

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Const:
        return nodes.Const(node.data, lineno=node.lineno)


@pass_context
def _print(_: Context, value: Any) -> str:
    check_size(value)
    text = str(value)
    _meter.get().add_output(len(text))
    return text


def _each(iterable: Iterable[Any]) -> Iterator[Any]:
    meter = _meter.get()
    for item in iterable:
        meter.step()
        yield item


def _concatenate(operands: list[Any]) -> str:
    _meter.get().step()
    check_size(operands)
    return "".join(map(str, operands))


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    # Jinja hands some filters the context, the environment or the evaluation context before the value.
    num_passed = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        _meter.get().step()
        check_filter(name, args[num_passed:], kwargs)
        return function(*args, **kwargs)

    return guarded
