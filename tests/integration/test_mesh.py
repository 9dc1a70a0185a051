"""A model split over the devices of a mesh answers as transformers did, and as one device does."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

HERE = Path(__file__).parent
PARITY = HERE.parent / "parity"
CONFIGS = json.loads((PARITY / "llama.json").read_text())
# Of the standard deviation of the logits.
TOLERANCE = 1e-4

pytestmark = pytest.mark.slow


def checkpoint(config: dict[str, Any], folder: Path) -> Path:
    spec = importlib.util.spec_from_file_location("seeded", PARITY / "seeded.py")
    assert spec and spec.loader
    seeded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(seeded)
    seeded.seeded_checkpoint(config, folder)
    return folder


def side(folder: Path, devices: int, prompt: list[int], new: int) -> dict[str, Any]:
    """What a mesh of so many devices computes."""
    command = [sys.executable, str(HERE / "mesh_side.py"), str(folder), str(devices)]
    asked = json.dumps({"prompt": prompt, "new": new})
    done = subprocess.run(command, input=asked, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("name", "devices"), [("gqa2_llama3_tied", 2), ("mha_default", 4)])
def test_a_mesh_answers_as_transformers_did(name: str, devices: int, tmp_path: Path) -> None:
    with np.load(PARITY / "references" / f"llama_{name}.npz") as reference:
        wanted = dict(reference)
    found = side(checkpoint(CONFIGS[name], tmp_path), devices, wanted["prompt"].tolist(), len(wanted["greedy"]))
    logits = np.array(found["logits"])
    assert logits.shape == wanted["logits"].shape
    assert np.abs(logits - wanted["logits"]).max() <= TOLERANCE * wanted["logits"].std()
    assert found["answer"] == wanted["greedy"].tolist()
    assert found["stamp"]["devices"] == devices
    config = CONFIGS[name]
    assert found["shapes"]["embed"] == [config["vocab_size"] // devices, config["hidden_size"]]
    kv_heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    assert found["shapes"]["pages"][2] == kv_heads // devices


def test_biases_are_added_once_and_an_odd_vocabulary_stays_whole(tmp_path: Path) -> None:
    config = {**CONFIGS["gqa8_linear_biases"], "num_key_value_heads": 2, "vocab_size": 257}
    assert config["attention_bias"] and config["mlp_bias"]
    folder, prompt = checkpoint(config, tmp_path), [3, 250, 17, 99, 4]
    one, two = (side(folder, devices, prompt, 16) for devices in (1, 2))
    wanted, found = np.array(one["logits"]), np.array(two["logits"])
    assert np.abs(wanted - found).max() <= TOLERANCE * wanted.std()
    assert one["answer"] == two["answer"] and len(two["answer"]) == 16
    assert two["shapes"]["embed"] == [257, 64]
    assert two["shapes"]["blocks.0.qkv"][0] * 2 == one["shapes"]["blocks.0.qkv"][0]
