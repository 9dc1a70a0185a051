"""The tokenizer: byte-level BPE, trained on the corpus, with the four marks of a conversation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from .corpus import Entry

BOS, SYSTEM, USER, ASSISTANT, END = "<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL = (BOS, SYSTEM, USER, ASSISTANT, END)
VOCAB_SIZE = 8192

# A message starts with a space, so that a headword is made of the tokens that it has inside a definition.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message.role == 'system' %}<|system|> {{ message.content | trim }}<|end|>"
    "{% elif message.role == 'user' %}<|user|> {{ message.content | trim }}<|end|>"
    "{% elif message.role == 'assistant' %}<|assistant|>{{ message.content | trim }}<|end|>"
    "{% else %}{{ raise_exception('roles are system, user and assistant, not ' ~ message.role) }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(entries: tuple[Entry, ...]) -> Tokenizer:
    """Trains VOCAB_SIZE tokens on headwords and glosses; every byte has a token, so that any text comes back whole."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(entries), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, id_of(tokenizer, BOS))]
    )
    return tokenizer


def id_of(tokenizer: Tokenizer, mark: str) -> int:
    """The token of one of SPECIAL."""
    found = tokenizer.token_to_id(mark)
    assert found is not None, f"the tokenizer was trained without {mark}"
    return found


def _texts(entries: tuple[Entry, ...]) -> Iterator[str]:
    yield from dict.fromkeys(entry.gloss for entry in entries)
    for headword in dict.fromkeys(entry.headword for entry in entries):
        yield f" {headword}"


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_position: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json as transformers reads them."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": END,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_position,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
