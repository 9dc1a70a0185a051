"""`python -m max.bench.device --cache-dir DIR`: everything that can only be learnt where the device is, in one command.

Loads the artifact that `max warm-cache --target` has made elsewhere, or makes it; compares its greedy tokens with those
of this host's CPU in float32, and its most likely successor at every position of that text; times decoding, and says
which part of the memory bandwidth it reaches. Prints one JSON object. Exit code 1 when the tokens differ.

anywhere:       max warm-cache --target cuda:sm_90 --quantization-encoding float32 --max-length 512 --cache-dir DIR
on the device:  python -m max.bench.device --cache-dir DIR
a dry run:      python -m max.bench.device --cache-dir DIR --target cpu:x86-64-v3
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from ...compiler.config import CompileConfig

_BUILT_IN = Path(__file__).resolve().parents[2] / "models" / "builtin"
_PROMPT = (1, 2, 3, 4)  # any ids will do: both sides get the same


def compare(target: str, model: Path, cache_dir: Path, *, tokens: int, length: int) -> dict[str, Any]:
    """Runs both sides, each in a process of its own, and compares them."""
    settings = ["--model", str(model), "--cache-dir", str(cache_dir), "--max-length", str(length)]
    settings += ["--quantization-encoding", "float32", "--json"]
    asked = {"prompt": _PROMPT, "tokens": tokens}
    here = _run("max", "warm-cache", *settings, "--target", "cpu:native")
    cpu = _run("max.bench.device.side", json.dumps({**here, **asked, "text": []}))
    made = _run("max", "warm-cache", *settings, "--target", target)
    text = [*_PROMPT, *cpu["answer"]]
    device = _run("max.bench.device.side", json.dumps({**made, **asked, "text": text[:-1]}))
    told = device["successors"][len(_PROMPT) - 1 :]
    equal = sum(map(int.__eq__, cpu["answer"], told))
    rate, bandwidth = 1 / device["step_seconds"], device["bandwidth"]
    return {
        "target": made["target"],
        "artifact": made["artifact"],
        "made_elsewhere": "compile" not in made["seconds"],
        "greedy_tokens_equal": device["answer"] == cpu["answer"],
        "forced_positions": len(told),
        "forced_equal_share": equal / len(told),
        "load_seconds": round(device["load_seconds"], 3),
        "tokens_per_second": round(rate, 2),
        "cpu_tokens_per_second": round(1 / cpu["step_seconds"], 2),
        "bandwidth_share": round(device["weight_bytes"] * rate / bandwidth, 4) if bandwidth else None,
    }


def _run(module: str, *arguments: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{module} failed, exit code {done.returncode}")
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="target of the artifact [default: the first GPU of this host]")
    parser.add_argument("--model", type=Path, default=_BUILT_IN, help="checkpoint [default: the built-in model]")
    parser.add_argument("--cache-dir", type=Path, required=True, help="cache that holds the artifact, or will")
    parser.add_argument("--tokens", type=int, default=256, help="tokens to compare [default: 256]")
    parser.add_argument("--length", type=int, default=512, help="--max-length of the artifact [default: 512]")
    given = parser.parse_args()
    target = given.target or CompileConfig(devices="gpu").target().name
    found = compare(target, given.model, given.cache_dir, tokens=given.tokens, length=given.length)
    print(json.dumps(found, indent=1))
    sys.exit(0 if found["greedy_tokens_equal"] else 1)


if __name__ == "__main__":
    main()
