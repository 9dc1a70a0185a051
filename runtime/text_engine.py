"""Starts an engine: prepares what is missing, then reads weights into the arena while the first code is loaded."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from .. import CacheError
from ..cache.key import Key
from ..cache.store import Store
from ..compiler import threads, xla, xla_targets
from ..compiler.limits import NEW_PAGES, Limits
from . import prepared
from .config import SchedulingConfig
from .device_memory import check_host, check_loaded
from .engine import Engine
from .model import Executables, Model, State
from .policy import Policy
from .preparation_report import Prepared, Report
from .session import CompiledModels, InferenceSession


@dataclass(frozen=True)
class Started:
    """A running engine, what it was made from, and the seconds that loading code and weights took."""

    engine: Engine
    prepared: Prepared
    load_seconds: float
    executables: Executables

    @property
    def report(self) -> Report:
        return self.prepared.report

    def load_rest(self) -> None:
        """Loads the executables that no request has needed yet, those of small steps first; raises CacheError."""
        limits = self.prepared.limits
        graphs = [f"sample_{kind}_r{rows}" for kind in ("greedy", "full") for rows in limits.row_buckets]
        graphs += [f"step_t{tokens}_r{rows}" for tokens in limits.token_buckets for rows in limits.logit_rows(tokens)]
        graphs += self.prepared.compiled.graphs  # and whatever else there is
        for graph in graphs:
            for name, _ in self.prepared.compiled.graphs[graph].calls:
                self.executables.load(name)


def start(
    prepare: Callable[[], Prepared],
    store: Store,
    prompt_tokens: int = 1,
    *,
    scheduling: SchedulingConfig | None = None,
    max_waiting: int | None = None,
    use: xla_targets.DeviceUse | None = None,
) -> Started:
    """Prepares and loads; the executables of decoding and of a prompt of this length first, others when needed.

    prepare: called once, and once more when what the store gave turns out to be damaged
    max_waiting: requests that may wait for a row, None for any number
    use: which devices to run on, and how much of their memory to take
    """

    def engine(models: dict[str, Model], found: Prepared, state: State) -> Engine:
        config = scheduling or SchedulingConfig()
        return Engine(
            models,
            found.limits,
            found.compiled.vocab_size,
            policy=Policy.of(config),
            overlap=config.enable_overlap_scheduler,
            max_waiting=max_waiting,
            check_state=state.check,
        )

    found = prepare()
    try:
        return _load(found, store, prompt_tokens, use, engine)
    except CacheError:
        return _load(prepare(), store, prompt_tokens, use, engine)


def _load(
    found: Prepared,
    store: Store,
    prompt_tokens: int,
    use: xla_targets.DeviceUse | None,
    engine: Callable[[dict[str, Model], Prepared, State], Engine],
) -> Started:
    """Loads code and weights at once; raises CacheError for damaged ones, which are set aside by then."""
    started = time.perf_counter()
    compiled, limits = found.compiled, found.limits
    executables, state = Executables(compiled.load_executable), State()
    device = compiled.device()
    with ThreadPoolExecutor(max_workers=3, thread_name_prefix="load") as pool:
        weights = pool.submit(_weights, found)
        xla_targets.use_device(device, compiled.libraries, use)
        xla.start_client()
        check_loaded(compiled, xla.memory_limit())
        pages = pool.submit(_make_pages, compiled, limits, executables, state)
        code = [pool.submit(executables.load, name) for name in _first_needed(compiled, limits, prompt_tokens)]
        try:
            arrays = weights.result()
        except CacheError as error:
            store.quarantine_prepared(found.weights.id, error)
            raise
        try:
            for each in code:
                each.result()
        except CacheError as error:
            store.quarantine(Key(found.report.key, {}), error)
            raise
        pages.result()
        models = InferenceSession(device.name).init_all(compiled, arrays, executables, state)
    return Started(engine(models, found, state), found, time.perf_counter() - started, executables)


def _first_needed(compiled: CompiledModels, limits: Limits, prompt_tokens: int) -> list[str]:
    """The executables of the prompt's first step, then of decoding."""
    largest = limits.token_buckets[-1]
    bucket = next(bucket for bucket in limits.token_buckets if bucket >= min(prompt_tokens, largest))
    graphs = (f"step_t{bucket}_r{limits.logit_rows(bucket)[0]}", _decoding(limits))
    return list(dict.fromkeys(name for graph in graphs for name, _ in compiled.graphs[graph].calls))


def _make_pages(compiled: CompiledModels, limits: Limits, executables: Executables, state: State) -> None:
    graph = compiled.graphs.get(NEW_PAGES)
    specs = compiled.graphs[_decoding(limits)].state
    if compiled.device().platform == "cpu":
        check_host(specs)
    if graph is None:
        state.allocate(specs)
        return
    names = [each.name for each in graph.outputs]
    state.keep(names, [buffer.array for buffer in Model(graph, executables, {}, state)()])


def _decoding(limits: Limits) -> str:
    """The step of one sequence that decodes."""
    smallest = limits.token_buckets[0]
    return f"step_t{smallest}_r{limits.logit_rows(smallest)[0]}"


def _weights(found: Prepared) -> Mapping[str, np.ndarray]:
    file, identity, arena = found.weights.file, found.weights.id, found.weights.arena
    if arena is not None:
        arena.check_huge_pages()
        return arena.views()
    assert file is not None, "prepared weights are in a file or in an arena"
    return prepared.load(file, threads=threads.count(), expected_id=identity)
