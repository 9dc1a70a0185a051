"""Turns a run's newest checkpoint into the files that ship: `python -m max.models.builtin.export --run DIR`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import click
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from safetensors.numpy import save
from tokenizers import Tokenizer

from ... import ModelError
from ..llama_config import Config
from . import FOLDER
from .tokenizer import BOS, END, id_of
from .train import CHECKPOINTS, HF_CONFIG, RUN_FILE, TOKENS_PER_STEP, initial_state, optimizer

# Answers that looped: 8 of 600 at temperature 0.5, none of 400 at 0.9. So small a model needs the noise.
SAMPLING = {"do_sample": True, "temperature": 0.9, "top_k": 40, "top_p": 0.95}


def export(run: Path, to: Path) -> int:
    """Writes the checkpoint folder `to` and returns the step it holds; raises ModelError where `run` has none."""
    step, params = newest_params(run)
    to.mkdir(parents=True, exist_ok=True)
    tensors = hf_tensors(Config.from_hf(HF_CONFIG), params)
    (to / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(run / name, to / name)
    tokenizer = Tokenizer.from_file(str(to / "tokenizer.json"))
    marks = {"bos_token_id": id_of(tokenizer, BOS), "eos_token_id": id_of(tokenizer, END)}
    marks["pad_token_id"] = marks["eos_token_id"]
    _write(to / "config.json", HF_CONFIG | marks | {"dtype": "bfloat16"})
    _write(to / "generation_config.json", marks | SAMPLING)
    seed = json.loads((run / RUN_FILE).read_text(encoding="utf-8"))["seed"]
    _write(to / "training.json", {"steps": step, "tokens": step * TOKENS_PER_STEP, "seed": seed})
    return step


def newest_params(run: Path) -> tuple[int, dict[str, Any]]:
    """The step and the parameters of the newest checkpoint, float32; raises ModelError where there is none."""
    with ocp.CheckpointManager((run / CHECKPOINTS).resolve()) as kept:
        step = kept.latest_step()
        if step is None:
            raise ModelError(f"{run} holds no checkpoint", f"Train: python -m max.models.builtin.train --out {run}")
        _, _, state = initial_state(seed=0, rule=optimizer(steps=step))
        return step, kept.restore(step, args=ocp.args.StandardRestore(state))["params"]


def hf_tensors(config: Config, params: dict[str, Any]) -> dict[str, np.ndarray]:
    """The checkpoint's tensors, bfloat16: the fused matrices split again and turned to (outputs, inputs)."""
    tensors = {}
    for weight in config.weights().weights:
        value: Any = params
        for key in weight.name.split("."):
            value = value[int(key) if key.isdigit() else key]
        parts = np.split(np.asarray(value), np.cumsum(weight.widths)[:-1], axis=-1) if weight.widths else [value]
        for source, part in zip(weight.sources, parts, strict=True):
            turned = np.asarray(part).T if weight.transposed else np.asarray(part)
            tensors[source] = np.ascontiguousarray(turned).astype(jnp.bfloat16)
    return tensors


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@click.command()
@click.option("--run", type=click.Path(path_type=Path, exists=True), required=True, help="The --out of training.")
@click.option("--to", type=click.Path(path_type=Path), default=FOLDER, help="The folder to write; the package's own.")
def main(run: Path, to: Path) -> None:
    """Writes bfloat16 weights, configs and tokenizer of a training run."""
    click.echo(f"step={export(run, to)} folder={to}")


if __name__ == "__main__":
    main()
