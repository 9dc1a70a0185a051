"""Training rows: questions and answers from the corpus, packed into conversations of one length; deterministic."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from tokenizers import Tokenizer

from .corpus import Entry
from .tokenizer import ASSISTANT, BOS, END, SYSTEM, USER, id_of

PROMPTS = (
    (0.62, "{}"),
    (0.16, "{}:"),
    (0.04, "What is a {}?"),
    (0.03, "What is {}?"),
    (0.03, "What does {} mean?"),
    (0.03, "Define {}."),
    (0.03, "define {}"),
    (0.03, "{}?"),
    (0.03, "the meaning of {}"),
)
"""How often, and in which words, the user asks."""
SYSTEM_PROMPTS = ("You are a dictionary.", "You are a helpful assistant.", "Answer with a definition.", "Be brief.")
SYSTEM_SHARE = 0.15
PLAIN_SHARE = 0.1
"""Rows of `headword: gloss` without a chat template, for prompts that are completed as they stand."""
CAPITAL_SHARE = 0.05
QUESTION_WEIGHT = 0.1
"""Headwords come in no order, so their loss teaches little; answers weigh 1."""

Row = tuple[np.ndarray, np.ndarray]


def batches(entries: tuple[Entry, ...], tokenizer: Tokenizer, length: int, rows: int, seed: int) -> Iterator[Row]:
    """Endless batches of tokens (rows, length + 1) int32 and loss weights of the same shape, float32.

    Each epoch is shuffled by (seed, length, epoch); the turn at a row's end is cut off.
    """
    epoch = 0
    while True:
        rng = np.random.default_rng((seed, length, epoch))
        tokens, weights = _epoch(entries, tokenizer, length, rng)
        for start in range(0, len(tokens) - rows + 1, rows):
            yield tokens[start : start + rows], weights[start : start + rows]
        epoch += 1


def chat_turns(entries: list[Entry], tokenizer: Tokenizer, rng: np.random.Generator) -> list[Row]:
    """Each entry as a question and its answer, with loss weights; the question's wording is drawn at random."""
    shares = np.array([share for share, _ in PROMPTS])
    drawn = rng.choice(len(PROMPTS), len(entries), p=shares / shares.sum())
    capital = rng.random(len(entries)) < CAPITAL_SHARE
    questions = []
    for entry, prompt, big in zip(entries, drawn, capital, strict=True):
        word = entry.headword[:1].upper() + entry.headword[1:] if big else entry.headword
        questions.append(f"{USER} {PROMPTS[prompt][1].format(word)}{END}{ASSISTANT}")
    return _join(tokenizer, questions, [entry.gloss + END for entry in entries])


def plain_turns(entries: list[Entry], tokenizer: Tokenizer) -> list[Row]:
    """Each entry as `headword: gloss`, with loss weights."""
    return _join(tokenizer, [f"{e.headword}:" for e in entries], [f" {e.gloss}{END}" for e in entries])


def _join(tokenizer: Tokenizer, questions: list[str], answers: list[str]) -> list[Row]:
    turns = []
    pairs = zip(
        tokenizer.encode_batch(questions, add_special_tokens=False),
        tokenizer.encode_batch(answers, add_special_tokens=False),
        strict=True,
    )
    for question, answer in pairs:
        weights = np.ones(len(question.ids) + len(answer.ids), np.float32)
        weights[: len(question.ids)] = QUESTION_WEIGHT
        turns.append((np.array(question.ids + answer.ids, np.int32), weights))
    return turns


def _epoch(entries: tuple[Entry, ...], tokenizer: Tokenizer, length: int, rng: np.random.Generator) -> Row:
    order = [entries[i] for i in rng.permutation(len(entries))]
    plain = int(len(order) * PLAIN_SHARE)
    openings = [tokenizer.encode(f"{SYSTEM} {text}{END}", add_special_tokens=False).ids for text in SYSTEM_PROMPTS]
    bos = id_of(tokenizer, BOS)

    def opening() -> list[int]:
        asked = rng.random() < SYSTEM_SHARE
        return [bos, *openings[rng.integers(len(openings))]] if asked else [bos]

    rows = _pack(chat_turns(order[plain:], tokenizer, rng), length + 1, opening)
    rows += _pack(plain_turns(order[:plain], tokenizer), length + 1, lambda: [bos])
    shuffled = [rows[i] for i in rng.permutation(len(rows))]
    return np.stack([tokens for tokens, _ in shuffled]), np.stack([weights for _, weights in shuffled])


def _pack(turns: list[Row], length: int, opening: Callable[[], list[int]]) -> list[Row]:
    rows: list[Row] = []
    tokens, weights = np.zeros(length, np.int32), np.zeros(length, np.float32)
    filled = 0
    for turn, turn_weights in turns:
        if filled == 0:
            start = opening()
            tokens[: len(start)], filled = start, len(start)
        space = min(len(turn), length - filled)
        tokens[filled : filled + space], weights[filled : filled + space] = turn[:space], turn_weights[:space]
        filled += space
        if filled == length:
            rows.append((tokens, weights))
            tokens, weights = np.zeros(length, np.int32), np.zeros(length, np.float32)
            filled = 0
    return rows
