"""OpenVINO GenAI under measurement: its continuous batching pipeline, with paged attention.

A step is a call of `ContinuousBatchingPipeline.step`; prefill is the step that takes a whole prompt and gives its first
token. Weights: float32; float16 files computed as bfloat16; int8 per channel; int4 in groups of 128, symmetric; the
last three with INFERENCE_PRECISION_HINT bf16. The type of keys and values is left to OpenVINO.
"""

# The peer is installed in an environment of its own.
# pyright: reportMissingImports=false

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino
import openvino_genai as genai

from .protocol import Times, prompt, serve

_INT4 = ("int4", "--sym", "--group-size", "128", "--ratio", "1.0")
_FORMATS = {"float32": ("fp32",), "bfloat16": ("fp16",), "q8_0": ("int8",), "q4_0": _INT4, "q4_k": _INT4}
_ENDLESS = 1 << 20


class OpenVinoRunner:
    """One pipeline; requests stay in it between measurements."""

    def load(self, checkpoint: Path, encoding: str, threads: int) -> str:
        folder = _converted(checkpoint, encoding)
        self._vocab_size = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
        scheduler = genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = 512
        scheduler.cache_size = 1
        hint = "f32" if encoding == "float32" else "bf16"
        properties = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": hint}
        self._pipeline = genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", properties)
        self._handles: list[genai.GenerationHandle] = []
        self._seed = 0
        weights = " ".join(_FORMATS[encoding])
        return f"openvino-genai {genai.__version__}, {threads} threads, weights {weights}, inference precision {hint}"

    def _add(self, tokens: int, new_tokens: int) -> genai.GenerationHandle:
        self._seed += 1
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new_tokens, True, False
        ids = np.array([prompt(self._seed, tokens, self._vocab_size)], np.int64)
        return self._pipeline.add_request(self._seed, openvino.Tensor(ids), config)

    def close(self) -> None:
        for handle in self._handles:
            handle.stop()
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        self._handles = []

    def open(self, batch: int, context: int) -> list[int]:
        self.close()
        self._handles = [self._add(context, _ENDLESS) for _ in range(batch)]
        first: dict[int, int] = {}
        while len(first) < batch:
            self._pipeline.step()
            for i, handle in enumerate(self._handles):
                if i not in first and handle.can_read():
                    first[i] = next(iter(handle.read().values())).generated_ids[0]
        self._pipeline.step()
        return [first[i] for i in range(batch)]

    def decode(self, steps: int) -> Times:
        times = Times()
        for _ in range(steps):
            times.add(self._pipeline.step)
        return times

    def prefill(self, tokens: int) -> Times:
        self.close()
        times = Times()
        handle = self._add(tokens, 1)
        times.add(self._pipeline.step)
        assert handle.can_read(), "the prompt took more than a step"
        handle.read()
        return times


def _converted(checkpoint: Path, encoding: str) -> Path:
    """The checkpoint in OpenVINO's form beside it, written if it is not there."""
    form = _FORMATS[encoding]
    folder = checkpoint / "openvino" / form[0]
    if not (folder / "openvino_model.bin").exists():
        program = Path(sys.executable).with_name("optimum-cli")
        task = ("--task", "text-generation-with-past", "--weight-format", *form)
        command = [str(program), "export", "openvino", "--model", str(checkpoint), *task, str(folder)]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return folder


if __name__ == "__main__":
    serve(OpenVinoRunner)
