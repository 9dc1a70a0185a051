"""Our engine under measurement: what `max generate` runs, with requests in it and nothing left out."""

from __future__ import annotations

import json
from pathlib import Path

from ..cache.config import CacheConfig
from ..cache.store import Store
from ..compiler.config import CompileConfig
from ..compiler.native import library
from ..runtime.checkpoint import Checkpoint
from ..runtime.config import BatchConfig, ModelConfig, SchedulingConfig
from ..runtime.engine import Engine
from ..runtime.preparation import Preparation
from ..runtime.request import Request
from ..runtime.sampling import SamplingParams
from ..runtime.step_results import Token
from ..runtime.text_engine import start
from .peers.protocol import Times, prompt, serve

MAX_LENGTH = 4608  # tokens of context, for the longest measurement and its steps


def make_preparation(checkpoint: Path, encoding: str) -> Preparation:
    """As the commands make it, with default settings but for the encoding and a context of MAX_LENGTH."""
    config = json.loads((checkpoint / "config.json").read_text())
    length = min(MAX_LENGTH, config["max_position_embeddings"])
    model = ModelConfig.model_validate(
        {"model_path": checkpoint, "quantization_encoding": encoding, "max_length": length}
    )
    compiling, batch, cache = CompileConfig(), BatchConfig(), CacheConfig()
    settings = (model, compiling, batch, cache)
    return Preparation(
        Checkpoint.open(checkpoint),
        Store.open(cache),
        model,
        batch,
        compiling.target(),
        use_subgraphs=compiling.use_subgraphs,
        settings=settings,
        keep_weights=True,
    )


class EngineRunner:
    """Requests go in as from `max generate --temperature 0`; a step is a call of `Engine.step`."""

    def load(self, checkpoint: Path, encoding: str, threads: int) -> str:
        kernels = library()
        assert kernels is not None, "the package was installed without kernels"
        kernels.set_num_threads(threads)
        preparation = make_preparation(checkpoint, encoding)
        # Every step is to compute what it is asked for, and to have done so when it returns.
        scheduling = SchedulingConfig(enable_prefix_caching=False, enable_overlap_scheduler=False)
        self._engine: Engine = start(preparation.run, preparation.store, scheduling=scheduling).engine
        self._seed = 0
        self._open: list[str] = []
        return f"{kernels.isa}, {threads} threads"

    def _add(self, tokens: int, new_tokens: int | None) -> str:
        self._seed += 1
        ids = prompt(self._seed, tokens, self._engine.vocab_size)
        request = Request(str(self._seed), ids, SamplingParams(temperature=0), new_tokens, ignore_eos=True)
        self._engine.add(request)
        return request.id

    def close(self) -> None:
        for request_id in self._open:
            self._engine.abort(request_id)
        self._open = []

    def open(self, batch: int, context: int) -> list[int]:
        self.close()
        self._open = [self._add(context, None) for _ in range(batch)]
        first: dict[str, int] = {}
        new = 0
        while new < batch:  # until every sequence is past its prompt
            tokens = self._engine.step()
            new = len(tokens)
            for token in tokens:
                assert isinstance(token, Token), token
                first.setdefault(token.request_id, token.id)
        self._engine.step()  # the first step of this size loads its code
        return [first[request] for request in self._open]

    def decode(self, steps: int) -> Times:
        times = Times()
        for _ in range(steps):
            tokens = times.add(self._engine.step)
            assert len(tokens) == len(self._open), "a sequence ended, or a step computed something else"
        return times

    def prefill(self, tokens: int) -> Times:
        self.close()
        times = Times()
        self._add(tokens, 1)
        new = times.add(self._engine.step)
        assert len(new) == 1 and self._engine.is_idle, "the prompt took more than a step"
        return times


if __name__ == "__main__":
    serve(EngineRunner)
