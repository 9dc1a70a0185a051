"""The corpus: WordNet's definitions, paired with the words they define and split by headword.

Source of the format: wndb(5WN). The database is that of Debian's `wordnet-base`.
"""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from ... import ModelError

WORDNET = Path("/usr/share/wordnet")
PARTS = ("noun", "verb", "adj", "adv")
MAX_SENSES = 3
"""Senses of a word that are kept, in WordNet's order of frequency: rarer ones blur the answer for common words."""
MAX_GLOSS_CHARS = 220
HELD_OUT_PER_THOUSAND = 10

_ADJECTIVE_POSITION = re.compile(r"\((a|p|ip)\)$")
_EXAMPLE = re.compile(r'\s*[;:,]?\s*"')


@dataclass(frozen=True, order=True)
class Entry:
    """One sense of one word."""

    headword: str
    gloss: str


@dataclass(frozen=True)
class Corpus:
    """`train` shares neither a headword nor a gloss with `held_out`."""

    train: tuple[Entry, ...]
    held_out: tuple[Entry, ...]


def read_corpus(folder: Path = WORDNET) -> Corpus:
    """Reads the four parts of speech, sorted, the same on every machine; raises ModelError where a file is missing."""
    entries: set[Entry] = set()
    for part in PARTS:
        senses = _senses(_lines(folder / f"index.{part}"))
        for line in _lines(folder / f"data.{part}"):
            entries.update(_entries(line, senses))
    held_out = tuple(sorted(entry for entry in entries if is_held_out(entry.headword)))
    secret = {entry.gloss for entry in held_out}
    train = (entry for entry in entries if not is_held_out(entry.headword) and entry.gloss not in secret)
    return Corpus(tuple(sorted(train)), held_out)


def is_held_out(headword: str) -> bool:
    """One headword in a hundred, whatever its case, by its checksum."""
    return zlib.crc32(headword.lower().encode()) % 1000 < HELD_OUT_PER_THOUSAND


def clean_gloss(gloss: str) -> str:
    """The definition without its example sentences; a very long one is cut after a clause."""
    text = " ".join(_EXAMPLE.split(gloss, maxsplit=1)[0].split()).rstrip(" ;:,.")
    while len(text) > MAX_GLOSS_CHARS and "; " in text:
        text = text.rsplit("; ", 1)[0].rstrip(" ;:,.")
    return text if len(text) <= MAX_GLOSS_CHARS else ""


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ModelError(
            f"cannot read WordNet's {path}: {error.strerror}",
            "Install Debian's wordnet-base, or name the folder of a WordNet 3.0 database.",
        ) from None
    return [line for line in text.splitlines() if line and not line.startswith("  ")]  # the licence is indented


def _senses(index: list[str]) -> dict[str, list[str]]:
    """Offsets of each lemma's synsets, most frequent first."""
    senses: dict[str, list[str]] = defaultdict(list)
    for line in index:
        fields = line.split()
        senses[fields[0]] = fields[-int(fields[2]) :]
    return senses


def _entries(line: str, senses: dict[str, list[str]]) -> list[Entry]:
    data, _, gloss = line.partition(" | ")
    fields = data.split()
    offset, words = fields[0], fields[4 : 4 + 2 * int(fields[3], 16) : 2]
    text = clean_gloss(gloss)
    if not text:
        return []
    words = [_ADJECTIVE_POSITION.sub("", word) for word in words]
    kept = [word for word in words if offset in senses[word.lower()][:MAX_SENSES]]
    return [Entry(word.replace("_", " "), text) for word in kept]
