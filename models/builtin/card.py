"""The model card: README.md, rendered from training.json and evaluation.json so that its figures are those measured."""

from __future__ import annotations

import json
from pathlib import Path
from string import Template

_CARD = Template("""\
---
license: other
license_name: wordnet-3.0
language: en
tags: [llama, dictionary]
---
# The built-in dictionary model

A Llama of $parameters parameters, made from scratch so that the package can be tried without a download. It answers a
word with a sentence in the manner of a dictionary. It shows that loading, compiling and serving work. It has learnt how
definitions are written and not what words mean: nearly all its answers are made up, also for words that it has seen.

| | |
|---|---|
| Architecture | Llama: 5 layers, width 256, 8 heads of 32 (4 for keys and values), SwiGLU of 640, tied embeddings |
| Tokens | byte-level BPE, 8192 |
| Longest row | 1024 tokens, in the last 4 % of the steps; 256 before |
| Weights | bfloat16 safetensors |
| Trained on | $train_entries pairs of word and definition; $tokens tokens in $steps steps, AdamW, seed $seed |

## Data and licence

The definitions of WordNet 3.0 (Debian's `wordnet-base`), without their example sentences, and of each word the three
most frequent senses in each part of speech. One headword in a hundred is held out by its checksum; entries that share a
definition with one of those are left out of both. Nothing else was used. The weights and the tokenizer are derived from
WordNet and are distributed under its licence, below.

## Measured

| | |
|---|---|
| Bits per byte of the definition, held-out words ($held_out_entries entries) | $held_out_bits_per_byte |
| The same, of as many training entries | $train_bits_per_byte |
| Sampled answers (half to held-out words, half to seen ones) | $samples |
| Their words that the training text has | $known_words_percent % |
| Answers that loop (four words in a row three times, or again at once) | $answers_that_loop |
| Answers with four words in a row twice | $answers_with_a_phrase_twice_percent % |
| Training definitions with four words in a row twice | $training_glosses_with_a_phrase_twice_percent % |
| Answers without an end after 128 tokens | $answers_without_end |
| Empty answers | $answers_empty |
| Answers that are a training definition, word for word | $answers_verbatim_from_training |
| Mean length in tokens, the end included | $mean_answer_tokens |

Sampled with the chat template and the defaults of generation_config.json (temperature 0.9, top-k 40, top-p 0.95). The
temperature was chosen on other words and seeds: of 600 answers 8 looped at 0.5 (top-p 0.9) and 9 at 0.6 (top-p 0.8); of
400, none at 0.7 (top-p 0.9), 1 at 0.8 and none at 0.9 (both top-p 0.95). On the words of the table 1 looped at 0.7.
Examples, not chosen:

$examples

## How to use it

Ask with a word (`robot`, `robot:`) or a question (`What is a robot?`). Templates know the roles system, user and
assistant. Without a template, `robot:` is completed too.

## How it was made

    pip install ".[train]"
    python -m max.models.builtin.train --out RUN --steps $steps --seed $seed
    python -m max.models.builtin.export --run RUN
    python -m max.models.builtin.evaluate

Training took an hour and twenty minutes on two CPU cores that did other work too. It was interrupted and resumed twice,
once 50 steps into the decay of a shorter plan, so that the commands repeat it closely but not bit for bit.

## Licence of WordNet

This software and database is being provided to you, the LICENSEE, by Princeton University under the following license.
By obtaining, using and/or copying this software and database, you agree that you have read, understood, and will comply
with these terms and conditions.:

Permission to use, copy, modify and distribute this software and database and its documentation for any purpose and
without fee or royalty is hereby granted, provided that you agree to comply with the following copyright notice and
statements, including the disclaimer, and that the same appear on ALL copies of the software, database and
documentation, including modifications that you make for internal use or for distribution.

WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved.

THIS SOFTWARE AND DATABASE IS PROVIDED "AS IS" AND PRINCETON UNIVERSITY MAKES NO REPRESENTATIONS OR WARRANTIES, EXPRESS
OR IMPLIED. BY WAY OF EXAMPLE, BUT NOT LIMITATION, PRINCETON UNIVERSITY MAKES NO REPRESENTATIONS OR WARRANTIES OF
MERCHANT- ABILITY OR FITNESS FOR ANY PARTICULAR PURPOSE OR THAT THE USE OF THE LICENSED SOFTWARE, DATABASE OR
DOCUMENTATION WILL NOT INFRINGE ANY THIRD PARTY PATENTS, COPYRIGHTS, TRADEMARKS OR OTHER RIGHTS.

The name of Princeton University or Princeton may not be used in advertising or publicity pertaining to distribution of
the software and/or database. Title to copyright in this software, database and any associated documentation shall at
all times remain with Princeton University and LICENSEE agrees to preserve same.
""")


def render_card(folder: Path) -> str:
    """The card's text, of the figures in `folder`."""
    figures = {}
    for name in ("training.json", "evaluation.json"):
        figures |= json.loads((folder / name).read_text(encoding="utf-8"))
    examples = figures.pop("examples").items()
    shown = {name: f"{value:,}" if isinstance(value, int) else str(value) for name, value in figures.items()}
    shown |= {"steps": str(figures["steps"])}
    return _CARD.substitute(shown, examples="\n".join(f"- **{word}**: {answer}" for word, answer in examples))


def write_card(folder: Path) -> None:
    """Writes README.md into `folder`."""
    (folder / "README.md").write_text(render_card(folder), encoding="utf-8")
