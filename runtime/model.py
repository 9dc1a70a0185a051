"""A graph that can be called: its signature, its plan over executables, and its bound weights and state."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np

from .. import MaxError, RequestError
from ..compiler import TensorType, xla


class InputError(RequestError, ValueError):
    """An argument of a model has the wrong dtype, shape or number."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a model."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * xla.numpy_dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Buffer:
    """A tensor on the device: what models return, and take without a copy."""

    array: xla.Buffer
    dtype: str
    shape: tuple[int, ...]

    def to_numpy(self) -> np.ndarray:
        """Waits for the result; the array shares the buffer's memory and cannot be written to."""
        return xla.fetch(self.array)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.to_numpy(), dtype=dtype, copy=copy)


def share(array: np.ndarray) -> Buffer:
    """The array as a buffer, without a copy where it starts at a 64-byte boundary, as all of `lazy_zeros` do.

    What is written to the array is seen by later calls; nothing may be written while one that reads it is running.
    """
    return Buffer(xla.put(array), array.dtype.name, array.shape)


@dataclass(frozen=True)
class GraphSpec:
    """A graph as the artifact's manifest describes it; values are numbered as in compiler/segments.py."""

    name: str
    weights: tuple[TensorSpec, ...]
    state: tuple[TensorSpec, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    calls: tuple[tuple[str, tuple[int, ...]], ...]
    returns: tuple[int, ...]

    @staticmethod
    def from_json(name: str, row: Mapping[str, Any]) -> GraphSpec:
        def specs(role: str) -> tuple[TensorSpec, ...]:
            return tuple(_spec(argument) for argument in row["arguments"] if argument["role"] == role)

        calls = tuple((executable, tuple(arguments)) for executable, arguments, _ in row["calls"])
        outputs = tuple(map(_spec, row["outputs"]))
        return GraphSpec(name, specs("weight"), specs("state"), specs("input"), outputs, calls, tuple(row["returns"]))


def _spec(row: Mapping[str, Any]) -> TensorSpec:
    return TensorSpec(row["name"], row["dtype"], tuple(row["shape"]))


class Executables:
    """The executables of one artifact, each loaded when it is first called or when `load` is told to, once."""

    def __init__(self, load: Callable[[str], xla.Executable]) -> None:
        """load: reads, checks and loads an executable by name."""
        self._load = load
        self._loaded: dict[str, xla.Executable] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    @property
    def num_loaded(self) -> int:
        """How many are loaded."""
        return len(self._loaded)

    def load(self, name: str) -> xla.Executable:
        found = self._loaded.get(name)
        if found is not None:
            return found
        with self._lock:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:
            if name not in self._loaded:
                self._loaded[name] = self._load(name)
        return self._loaded[name]


class State:
    """The tensors that models update in place, zero at first; models of one load share them by name."""

    def __init__(self) -> None:
        self._arrays: dict[str, xla.Buffer | None] = {}

    def allocate(self, specs: Sequence[TensorSpec]) -> None:
        """Makes the tensors that are not there yet, so that the first call need not: zeroing pages takes its time."""
        for spec in specs:
            if spec.name not in self._arrays:
                self._arrays[spec.name] = xla.put_owned(spec.shape, spec.dtype)

    def take(self, specs: Sequence[TensorSpec], names: Sequence[str]) -> list[xla.Buffer]:
        """The tensors as arguments that are about to be donated; raises MaxError when a failed call took one along.

        names: those of the specs, which a step would spend a microsecond or two on
        """
        arrays = self._arrays
        try:
            found = [arrays[name] for name in names]
        except KeyError:
            self.allocate(specs)
            found = [arrays[name] for name in names]
        for name, array in zip(names, found, strict=True):
            if array is None:
                raise MaxError(f"the state {name} was lost in a call that failed", "Load the models anew.")
        arrays.update(dict.fromkeys(names))
        return found

    def keep(self, names: Sequence[str], arrays: Sequence[xla.Buffer]) -> None:
        """Takes the tensors' new values, in the same order."""
        self._arrays.update(zip(names, arrays, strict=True))

    def check(self) -> None:
        """Waits for the tensors; raises MaxError when one was lost in a call that failed, or came out of one."""
        arrays = list(self._arrays.values())
        if any(array is None for array in arrays):
            raise MaxError("the state was lost in a call that failed", "Load the models anew.")
        xla.wait(arrays)


class Model:
    """One loaded graph."""

    def __init__(self, spec: GraphSpec, executables: Executables, weights: Mapping[str, xla.Buffer], state: State):
        self._spec, self._executables, self._state = spec, executables, state
        self._weights = [weights[weight.name] for weight in spec.weights]
        self._state_names = [each.name for each in spec.state]
        self._calls: list[tuple[xla.Executable, _Chooser]] | None = None
        # A plan of one call, which takes what there is in its order, is made without numbers.
        num_arguments = len(spec.weights) + len(spec.state) + len(spec.inputs)
        everything = tuple(range(num_arguments + len(spec.outputs) + len(spec.state)))
        self._is_one_call = (
            [arguments for _, arguments in spec.calls] == [everything[:num_arguments]]
            and spec.returns == everything[num_arguments:]
        )  # fmt: skip

    @property
    def name(self) -> str:
        return self._spec.name

    @property
    def input_metadata(self) -> list[TensorSpec]:
        return list(self._spec.inputs)

    @property
    def output_metadata(self) -> list[TensorSpec]:
        return list(self._spec.outputs)

    def load(self) -> None:
        """Loads this graph's executables now rather than at the first call."""
        self._loaded_calls()

    def _loaded_calls(self) -> list[tuple[xla.Executable, _Chooser]]:
        """The calls in order, each with what chooses its arguments among the values that there are by then."""
        if self._calls is None:
            plan = [(self._executables.load(executable), arguments) for executable, arguments in self._spec.calls]
            self._calls = [(executable, _chooser(arguments)) for executable, arguments in plan]
        return self._calls

    def execute(self, *inputs: np.ndarray | Buffer) -> list[Buffer]:
        """Calls the graph and returns its outputs, which may still be being computed.

        Raises InputError unless number, dtypes and shapes are those of `input_metadata`: PJRT compares sizes only.
        Arrays are not copied: they must not be written to before an output has been fetched.
        """
        spec = self._spec
        if len(inputs) != len(spec.inputs):
            names = ", ".join(each.name for each in spec.inputs)
            raise InputError(f"{spec.name} takes {len(spec.inputs)} inputs, not {len(inputs)}", f"They are: {names}.")
        checked = [
            value.array
            if type(value) is Buffer and value.shape == want.shape and value.dtype == want.dtype
            else to_buffer(value, want, i)
            for i, (value, want) in enumerate(zip(inputs, spec.inputs, strict=True))
        ]
        calls = self._calls or self._loaded_calls()
        # Nothing but the calls themselves may fail from here on: they take the state with them.
        values = [*self._weights, *self._state.take(spec.state, self._state_names), *checked]
        if self._is_one_call:
            results = calls[0][0](values)
        else:
            for executable, arguments_of in calls:
                values += executable(arguments_of(values))
            results = [values[i] for i in spec.returns]
        self._state.keep(self._state_names, results[len(spec.outputs) :])
        return [Buffer(array, each.dtype, each.shape) for array, each in zip(results, spec.outputs, strict=False)]

    __call__ = execute

    def __repr__(self) -> str:
        return f"Model({self.name!r}, inputs={self.input_metadata}, outputs={self.output_metadata})"


_Chooser = Callable[[list[xla.Buffer]], Sequence[xla.Buffer]]


def _chooser(arguments: tuple[int, ...]) -> _Chooser:
    """From a list of values to those of these numbers."""
    if len(arguments) > 1:
        return itemgetter(*arguments)
    return lambda values: [values[i] for i in arguments]


def to_buffer(value: np.ndarray | Buffer, want: TensorSpec, position: int) -> xla.Buffer:
    """A value as a graph takes it, a numpy array's memory shared; raises InputError for another type."""
    check_type(value, want, position)
    return value.array if isinstance(value, Buffer) else xla.put(np.asarray(value, order="C"))


def check_type(value: np.ndarray | Buffer, want: TensorSpec, position: int) -> None:
    """Raises InputError unless a value has the shape and dtype that are wanted."""
    if not isinstance(value, (np.ndarray, Buffer)):
        raise InputError(f"input {want.name} at position {position} is a {type(value).__name__}", "Pass an array.")
    if value.shape != want.shape or str(value.dtype) != want.dtype:
        have = TensorType(str(value.dtype), tuple(value.shape))
        raise InputError(
            f"input {want.name} at position {position} is {have}", f"It must be {TensorType(want.dtype, want.shape)}."
        )
