"""Trains the built-in model: `python -m max.models.builtin.train --out DIR`; run again, it goes on where it was.

AdamW with a warm-up, a constant rate and a linear decay (arXiv:2405.18392). The rate before the decay does not depend
on the number of steps, so a run may be resumed with fewer or more. The last rows are long ones.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from tokenizers import Tokenizer

from ..llama import Llama
from ..llama_config import Config
from .conversations import Row, batches
from .corpus import WORDNET, Corpus, read_corpus
from .forward import hidden_states
from .tokenizer import VOCAB_SIZE, save_tokenizer, train_tokenizer

SHORT, LONG = 256, 1024
"""Tokens a row, at first and at the end; LONG, the longest position that the model knows, costs four times as much."""
LONG_SHARE = 0.04
TOKENS_PER_STEP = 2048
WARMUP_STEPS = 200
DECAY_SHARE = 0.25
PEAK_RATE = 2.5e-3
SECONDS_BETWEEN_CHECKPOINTS = 240.0
CHECKPOINTS, RUN_FILE = "checkpoints", "run.json"

State = dict[str, Any]
Step = Callable[[State, np.ndarray, np.ndarray], tuple[State, jax.Array]]

HF_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": LONG,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
}


def learning_rate(steps: int) -> optax.Schedule:
    """Warm-up, then PEAK_RATE, then a linear decay to a fiftieth of it over the last DECAY_SHARE of the steps."""
    decay = int(steps * DECAY_SHARE)
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, PEAK_RATE, WARMUP_STEPS),
            optax.constant_schedule(PEAK_RATE),
            optax.linear_schedule(PEAK_RATE, PEAK_RATE / 50, decay),
        ],
        [WARMUP_STEPS, steps - decay],
    )


def optimizer(steps: int) -> optax.GradientTransformation:
    """AdamW that decays matrices only."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            learning_rate(steps),
            b1=0.9,
            b2=0.98,
            weight_decay=0.1,
            mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
        ),
    )


def answer_loss(model: Llama, config: Config, tokens: jax.Array, weights: jax.Array) -> jax.Array:
    """Weighted mean cross-entropy of the next tokens, in nats. tokens: (B, T + 1) int32; weights: same, float32."""
    logits = model.logits(hidden_states(model, config, tokens[:, :-1]))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:].reshape(-1))
    scale = weights[:, 1:].reshape(-1)
    return jnp.sum(losses * scale) / jnp.sum(scale)


def training_batches(corpus: Corpus, tokenizer: Tokenizer, steps: int, seed: int, start: int) -> Iterator[Row]:
    """The batches of steps `start` and later: short rows, then long ones."""
    short_steps = steps - int(steps * LONG_SHARE)
    if start < short_steps:
        rows = batches(corpus.train, tokenizer, SHORT, TOKENS_PER_STEP // SHORT, seed)
        yield from islice(rows, start, short_steps)
    rows = batches(corpus.train, tokenizer, LONG, TOKENS_PER_STEP // LONG, seed)
    yield from islice(rows, max(0, start - short_steps), steps - short_steps)


def train(out: Path, wordnet: Path, steps: int, seed: int) -> None:
    """Runs up to `steps` steps from the newest checkpoint under `out`; raises ModelError without a WordNet."""
    out.mkdir(parents=True, exist_ok=True)
    (out / RUN_FILE).write_text(json.dumps({"steps": steps, "seed": seed}), encoding="utf-8")
    corpus = read_corpus(wordnet)
    tokenizer = train_tokenizer(corpus.train)
    save_tokenizer(tokenizer, out, LONG)
    config = Config.from_hf(HF_CONFIG)
    rule = optimizer(steps)
    graph, variables, state = initial_state(seed, rule)

    def step(state: State, tokens: jax.Array, weights: jax.Array) -> tuple[State, jax.Array]:
        def loss(pure: dict[str, Any]) -> jax.Array:
            return answer_loss(model_of(graph, variables, pure), config, tokens, weights)

        value, gradients = jax.value_and_grad(loss)(state["params"])
        updates, moments = rule.update(gradients, state["optimizer"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "optimizer": moments}, value

    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager((out / CHECKPOINTS).resolve(), options=options) as kept:
        start = kept.latest_step() or 0
        if start:
            state = kept.restore(start, args=ocp.args.StandardRestore(state))
        rows = training_batches(corpus, tokenizer, steps, seed, start)
        _loop(jax.jit(step, donate_argnums=0), state, rows, kept, start, steps)


def initial_state(seed: int, rule: optax.GradientTransformation) -> tuple[nnx.GraphDef[Llama], nnx.State, State]:
    """The model's definition, its variables, and the state that is trained and kept: parameters and moments."""
    graph, variables = nnx.split(Llama(Config.from_hf(HF_CONFIG), rngs=nnx.Rngs(seed)))
    pure = nnx.to_pure_dict(variables)
    return graph, variables, {"params": pure, "optimizer": rule.init(pure)}


def model_of(graph: nnx.GraphDef[Llama], variables: nnx.State, pure: dict[str, Any]) -> Llama:
    """The module with the arrays of a pure dict."""
    filled = jax.tree.map(lambda x: x, variables)
    nnx.replace_by_pure_dict(filled, pure)
    return nnx.merge(graph, filled)


def _loop(step: Step, state: State, rows: Iterator[Row], kept: ocp.CheckpointManager, start: int, steps: int) -> None:
    began = reported = saved = time.perf_counter()
    losses: list[jax.Array] = []
    for done, (tokens, weights) in enumerate(rows, start + 1):
        state, loss = step(state, tokens, weights)
        losses.append(loss)
        if done % 20 == 0 or done == steps:
            mean = float(np.mean([float(x) for x in losses]))
            now = time.perf_counter()
            rate = TOKENS_PER_STEP * len(losses) / (now - reported)
            left_min = (steps - done) * (now - began) / (done - start) / 60
            click.echo(f"step={done}/{steps} loss={mean:.4f} tokens_per_s={rate:.0f} left_min={left_min:.1f}")
            losses, reported = [], now
        if done == steps or time.perf_counter() - saved > SECONDS_BETWEEN_CHECKPOINTS:
            kept.save(done, args=ocp.args.StandardSave(state))
            kept.wait_until_finished()
            saved = time.perf_counter()


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Checkpoints go here.")
@click.option("--wordnet", type=click.Path(path_type=Path), default=WORDNET, show_default=True)
@click.option("--steps", default=3700, show_default=True, help=f"Steps of {TOKENS_PER_STEP} tokens.")
@click.option("--seed", default=0, show_default=True)
def main(out: Path, wordnet: Path, steps: int, seed: int) -> None:
    """Trains the built-in dictionary model on WordNet's definitions."""
    train(out, wordnet, steps, seed)


if __name__ == "__main__":
    main()
