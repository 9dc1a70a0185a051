"""Stage 5: modules to executables, in this process for the CPU of this host, in a process apart for other targets."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from . import threads, xla_compiler
from .compile_messages import Answer, Job
from .compile_process import CompileProcess, compiling
from .dump import Dump
from .targets import Target
from .targets.xla_options import PLAIN, Options, Products, xla_options

Executables = Iterator[tuple[str, xla_compiler.Compiled]]


def compile_all(sources: Mapping[str, bytes], target: Target, dump: Dump, products: Products = PLAIN) -> Executables:
    """Compiles StableHLO bytecode by name and yields each executable when it is there.

    products: how matrices are multiplied on GPUs. Raises ConfigError where the toolchain is missing, CompileError.
    """
    # XLA's dumps of two compilations at once have crashed the process.
    workers = 1 if dump.enabled else threads.count()
    if target.is_native:
        return _compile_here(sources, dump, workers)
    options = {name: xla_options(target, name, products) for name in sources}
    return _compile_apart(sources, options, target, dump, workers)


def _compile_here(sources: Mapping[str, bytes], dump: Dump, workers: int) -> Executables:
    with ThreadPoolExecutor(workers, thread_name_prefix="compile") as pool:
        jobs = {name: pool.submit(_compile_one, name, source, dump) for name, source in sources.items()}
        try:
            for name, job in jobs.items():
                yield name, job.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # an error or an interrupt ends the rest


def _compile_one(name: str, bytecode: bytes, dump: Dump) -> xla_compiler.Compiled:
    started = time.perf_counter()
    with dump.code(name) as folder:
        compiled = xla_compiler.compile_stablehlo(bytecode, name, folder)
    dump.write(name, "5.optimized.hlo", compiled.optimized_hlo, time.perf_counter() - started)
    return compiled


def _compile_apart(
    sources: Mapping[str, bytes], options: Mapping[str, Options], target: Target, dump: Dump, workers: int
) -> Executables:
    with compiling(target, workers) as process:
        if dump.enabled:
            for name, source in sources.items():
                yield name, _compile_and_dump(process, Job(name, source, options[name]), dump)
            return
        for name, source in sources.items():
            process.submit(Job(name, source, options[name]))
        for answer in process.answers():
            yield answer.name, _compiled(answer)


def _compile_and_dump(process: CompileProcess, job: Job, dump: Dump) -> xla_compiler.Compiled:
    with dump.code(job.name) as folder:
        process.submit(Job(job.name, job.module, job.options, folder))
        answer = process.answer()
    dump.write(job.name, "5.optimized.hlo", answer.optimized_hlo, answer.seconds)
    return _compiled(answer)


def _compiled(answer: Answer) -> xla_compiler.Compiled:
    return xla_compiler.Compiled(
        answer.executable, answer.flops, answer.bytes_accessed, dict(answer.memory), answer.optimized_hlo
    )
