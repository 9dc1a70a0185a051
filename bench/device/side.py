"""One side of the comparison, in a process of its own: loads a model for a device, and tells what it computes.

Started by `python -m max.bench.device` with a JSON object as its argument; prints one as its answer.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from ...cache import mef
from ...compiler import Target, xla_targets
from ...compiler.limits import Limits
from ...runtime import prepared
from ...runtime.session import CompiledModels, InferenceSession
from .walk import Walk, forced, greedy


def run(asked: dict[str, Any]) -> dict[str, Any]:
    """What a target computes.

    asked: artifact_path, weights_path and weights as `max warm-cache --json` tells them; prompt (ids); tokens, how many
    an answer has; text (ids, may be empty), whose successors are told
    """
    started = time.perf_counter()
    compiled = CompiledModels(mef.Mef.open(asked["artifact_path"]))
    device, limits = compiled.device(), Limits.from_json(compiled.facts["limits"])
    xla_targets.use_device(device, compiled.libraries)
    threads = len(os.sched_getaffinity(0))
    arrays = prepared.load(Path(asked["weights_path"]), threads=threads, expected_id=asked["weights"])
    models = InferenceSession(device.name).init_all(compiled, arrays)
    load_seconds = time.perf_counter() - started
    walk = Walk(models, limits)
    answer = greedy(walk, asked["prompt"], asked["tokens"])
    decoding = sorted(walk.seconds[-asked["tokens"] // 2 :])  # the first ones load code
    return {
        "answer": answer,
        "successors": forced(Walk(models, limits), asked["text"]) if asked["text"] else [],
        "load_seconds": load_seconds,
        "step_seconds": decoding[len(decoding) // 2],
        "weight_bytes": sum(array.nbytes for name, array in arrays.items() if name != "embed" or "head" not in arrays),
        "bandwidth": Target.parse(compiled.target).figures.get("memory_bandwidth", 0),
    }


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
