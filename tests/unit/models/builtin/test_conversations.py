"""Training rows: full, repeatable, and weighted so that answers count."""

from __future__ import annotations

from itertools import islice

import numpy as np
from tokenizers import Tokenizer

from max.models.builtin import FOLDER
from max.models.builtin.conversations import QUESTION_WEIGHT, batches, chat_turns, plain_turns
from max.models.builtin.corpus import Entry
from max.models.builtin.tokenizer import BOS, END

TOKENIZER = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
ENTRIES = tuple(Entry(f"word {i}", f"the meaning that comes {i} times in the list") for i in range(300))


def test_a_turn_asks_and_answers_and_weighs_the_answer() -> None:
    for entry, (tokens, weights) in zip(
        ENTRIES, chat_turns(list(ENTRIES), TOKENIZER, np.random.default_rng(0)), strict=True
    ):
        text = TOKENIZER.decode(tokens.tolist(), skip_special_tokens=False)
        assert text.startswith("<|user|> ") and entry.headword in text.lower()
        answer = TOKENIZER.decode(tokens[weights == 1].tolist(), skip_special_tokens=False)
        assert answer == entry.gloss + END
        assert set(weights.tolist()) == {np.float32(QUESTION_WEIGHT).item(), 1.0}


def test_a_plain_turn_is_a_line_of_a_dictionary() -> None:
    ((tokens, _),) = plain_turns([Entry("cat", "a feline")], TOKENIZER)
    assert TOKENIZER.decode(tokens.tolist(), skip_special_tokens=False) == "cat: a feline<|end|>"


def test_rows_are_full_and_start_with_bos_alone() -> None:
    bos = TOKENIZER.token_to_id(BOS)
    for tokens, weights in islice(batches(ENTRIES, TOKENIZER, length=64, rows=4, seed=0), 20):
        assert tokens.shape == weights.shape == (4, 65)
        assert (tokens[:, 0] == bos).all() and not (tokens[:, 1:] == bos).any()
        assert (weights[:, 0] == 0).all() and weights.any(axis=1).all()


def test_the_seed_fixes_the_order_and_epochs_differ() -> None:
    def first(seed: int) -> list[bytes]:
        return [tokens.tobytes() for tokens, _ in islice(batches(ENTRIES, TOKENIZER, 64, 4, seed), 100)]

    assert first(1) == first(1)
    assert first(1) != first(2)
    assert len(set(first(1))) == 100
