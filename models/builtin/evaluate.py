"""Measures the shipped files and writes the figures and the model card: `python -m max.models.builtin.evaluate`."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from ..llama import Llama
from ..llama_config import Config
from . import FOLDER
from .card import write_card
from .corpus import WORDNET, Corpus, Entry, read_corpus
from .export import SAMPLING
from .forward import hidden_states
from .tokenizer import ASSISTANT, BOS, END, USER, id_of

SAMPLES, SEED = 200, 0
MAX_ANSWER_TOKENS = 128
EXAMPLES = ("robot", "lighthouse", "volcano", "whisper", "melancholy", "Portugal")
WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True)
class Model:
    """The shipped files, loaded."""

    llama: Llama
    config: Config
    tokenizer: Tokenizer
    end: int

    @staticmethod
    def load(folder: Path) -> Model:
        """Reads a checkpoint folder into float32 parameters."""
        config = Config.from_hf(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        llama = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
        variables = nnx.state(llama)
        nnx.replace_by_pure_dict(variables, pure_params(config, load_file(folder / "model.safetensors")))
        nnx.update(llama, variables)
        return Model(llama, config, tokenizer, id_of(tokenizer, END))

    def prompt(self, text: str) -> list[int]:
        """The chat template around one user message."""
        return self.tokenizer.encode(f"{BOS}{USER} {text}{END}{ASSISTANT}", add_special_tokens=False).ids


def pure_params(config: Config, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """Checkpoint tensors as the model's parameters, float32: the inverse of `export.hf_tensors`."""
    params: dict[str, Any] = {"blocks": {layer: {} for layer in range(config.num_layers)}}
    for weight in config.weights().weights:
        parts = [tensors[source].astype(np.float32) for source in weight.sources]
        value = np.concatenate([part.T if weight.transposed else part for part in parts], axis=-1)
        *layer, name = weight.name.removeprefix("blocks.").split(".")
        (params["blocks"][int(layer[0])] if layer else params)[name] = jnp.asarray(value)
    return params


def bits_per_byte(model: Model, entries: Sequence[Entry], rows: int = 32, length: int = 96) -> float:
    """Bits that an answer and its end cost, per byte of the gloss's UTF-8, asked by headword alone.

    No entry of the corpus is longer than `length` tokens with its prompt; a longer one would be cut.
    """

    @jax.jit
    def nats(llama: Llama, tokens: jax.Array, scored: jax.Array) -> jax.Array:
        logits = llama.logits(hidden_states(llama, model.config, tokens[:, :-1]))
        costs = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:].reshape(-1, 1), axis=-1)[:, 0]
        return jnp.sum(jnp.where(scored[:, 1:].reshape(-1), costs, 0.0))

    total, total_bytes = 0.0, 0
    for start in range(0, len(entries), rows):
        tokens, scored = np.full((rows, length), model.end, np.int32), np.zeros((rows, length), bool)
        for row, entry in enumerate(entries[start : start + rows]):
            prompt = model.prompt(entry.headword)
            answer = [*model.tokenizer.encode(entry.gloss, add_special_tokens=False).ids, model.end]
            whole = (prompt + answer)[:length]
            tokens[row, : len(whole)], scored[row, len(prompt) : len(whole)] = whole, True
            total_bytes += len(entry.gloss.encode())
        total += float(nats(model.llama, jnp.asarray(tokens), jnp.asarray(scored)))
    return total / math.log(2) / total_bytes


def sample(model: Model, questions: Sequence[str], seed: int) -> list[list[int]]:
    """One answer each, at most MAX_ANSWER_TOKENS tokens, drawn with the shipped defaults; END is kept where it came."""
    prompts = [model.prompt(question) for question in questions]
    lengths = np.array([len(prompt) for prompt in prompts])
    limits = lengths + MAX_ANSWER_TOKENS
    tokens = np.full((len(prompts), limits.max()), model.end, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    alive, key = np.ones(len(prompts), bool), jax.random.key(seed)
    while alive.any():
        width = min(tokens.shape[1], -(-lengths.max() // 32) * 32)
        key, drawing = jax.random.split(key)
        drawn = np.asarray(
            _next_tokens(model.llama, model.config, jnp.asarray(tokens[:, :width]), jnp.asarray(lengths), drawing)
        )
        tokens[alive, lengths[alive]] = drawn[alive]
        lengths = lengths + alive
        alive &= (drawn != model.end) & (lengths < limits)
    return [list(map(int, row[len(p) : n])) for row, p, n in zip(tokens, prompts, lengths, strict=True)]


@partial(nnx.jit, static_argnums=1)
def _next_tokens(llama: Llama, config: Config, tokens: jax.Array, lengths: jax.Array, key: jax.Array) -> jax.Array:
    batch, width = tokens.shape
    x = hidden_states(llama, config, tokens).reshape(batch, width, -1)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
    logits, ids = jax.lax.top_k(llama.logits(last) / SAMPLING["temperature"], SAMPLING["top_k"])
    probabilities = jax.nn.softmax(logits)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    drawn = jax.random.categorical(key, jnp.where(before < SAMPLING["top_p"], logits, -jnp.inf))
    return jnp.take_along_axis(ids, drawn[:, None], axis=1)[:, 0]


def most_repeats(text: str) -> int:
    """How often the most frequent four words in a row come; definitions use a phrase twice now and then."""
    words = text.lower().split()
    return max(Counter(tuple(words[i : i + 4]) for i in range(len(words) - 3)).values(), default=0)


def loops(text: str) -> bool:
    """Whether four words in a row come three times, or four or more come again at once."""
    words = text.lower().split()
    again = any(
        words[i : i + size] == words[i + size : i + 2 * size]
        for size in range(4, len(words) // 2 + 1)
        for i in range(len(words) - 2 * size + 1)
    )
    return again or most_repeats(text) > 2


def _share_with_repeats(texts: Collection[str]) -> float:
    return sum(most_repeats(text) > 1 for text in texts) / len(texts)


def measure(model: Model, corpus: Corpus) -> dict[str, Any]:
    """The figures of the model card."""
    rng = np.random.default_rng(SEED)
    words = [sorted({entry.headword for entry in part}) for part in (corpus.held_out, corpus.train)]
    asked = [list(rng.choice(np.array(part), SAMPLES // 2, replace=False)) for part in words]
    answers = sample(model, [str(word) for part in asked for word in part], SEED)
    texts = [model.tokenizer.decode(answer) for answer in answers]
    known = {w.lower() for e in corpus.train for w in WORD.findall(f"{e.headword} {e.gloss}")}
    used = [word.lower() for text in texts for word in WORD.findall(text)]
    glosses = {entry.gloss for entry in corpus.train}
    seen = [corpus.train[i] for i in rng.choice(len(corpus.train), len(corpus.held_out), replace=False)]
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(nnx.state(model.llama))),
        "held_out_bits_per_byte": round(bits_per_byte(model, corpus.held_out), 3),
        "train_bits_per_byte": round(bits_per_byte(model, seen), 3),
        "held_out_entries": len(corpus.held_out),
        "train_entries": len(corpus.train),
        "samples": len(texts),
        "known_words_percent": round(100 * sum(word in known for word in used) / len(used), 2),
        "answers_without_end": sum(answer[-1] != model.end for answer in answers),
        "answers_that_loop": sum(map(loops, texts)),
        "answers_with_a_phrase_twice_percent": round(100 * _share_with_repeats(texts), 2),
        "training_glosses_with_a_phrase_twice_percent": round(100 * _share_with_repeats(glosses), 2),
        "answers_empty": sum(not text.strip() for text in texts),
        "answers_verbatim_from_training": sum(text in glosses for text in texts),
        "mean_answer_tokens": round(sum(map(len, answers)) / len(answers), 1),
        "examples": dict(zip(EXAMPLES, map(model.tokenizer.decode, sample(model, EXAMPLES, SEED)), strict=True)),
    }


@click.command()
@click.option("--folder", type=click.Path(path_type=Path, exists=True), default=FOLDER, help="The exported files.")
@click.option("--wordnet", type=click.Path(path_type=Path), default=WORDNET, show_default=True)
def main(folder: Path, wordnet: Path) -> None:
    """Measures the exported model, and writes evaluation.json and README.md next to it."""
    figures = measure(Model.load(folder), read_corpus(wordnet))
    text = json.dumps(figures, indent=2, ensure_ascii=False) + "\n"
    (folder / "evaluation.json").write_text(text, encoding="utf-8")
    write_card(folder)
    click.echo(text, nl=False)


if __name__ == "__main__":
    main()
