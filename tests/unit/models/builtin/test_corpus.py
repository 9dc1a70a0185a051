"""WordNet's files as the corpus reads them, on a database of a few lines in wndb(5WN)'s format."""

from __future__ import annotations

from pathlib import Path

import pytest

from max import ModelError
from max.models.builtin import corpus
from max.models.builtin.corpus import Entry, clean_gloss, read_corpus

LICENCE = "  1 This software and database is being provided to you, the LICENSEE\n"
DATA = {
    "noun": [
        '00000001 05 n 02 dog 0 domestic_dog 0 001 @ 00000009 n 0000 | a member of the genus Canis; "the dog barked"  ',
        "00000002 18 n 01 dog 2 000 | a dull unattractive girl  ",
        "00000003 18 n 01 dog 4 000 | a smooth-textured sausage  ",
        "00000004 18 n 01 dog 5 000 | the fourth sense  ",
    ],
    "verb": ["00000005 38 v 01 dog 0 000 01 + 08 00 | go after with the intent to catch  "],
    "adj": ["00000006 00 s 01 galore(ip) 0 000 | in great numbers  "],
    "adv": ["00000007 02 r 01 anew 0 000 | again but in a new way  "],
}
INDEX = {
    "noun": [
        "dog n 4 1 @ 4 1 00000001 00000002 00000003 00000004",
        "domestic_dog n 1 1 @ 1 0 00000001",
    ],
    "verb": ["dog v 1 0 1 0 00000005"],
    "adj": ["galore a 1 0 1 0 00000006"],
    "adv": ["anew r 1 0 1 0 00000007"],
}


@pytest.fixture
def wordnet(tmp_path: Path) -> Path:
    for name, files in (("data", DATA), ("index", INDEX)):
        for part, lines in files.items():
            (tmp_path / f"{name}.{part}").write_text(LICENCE + "\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def test_each_word_is_paired_with_its_most_frequent_senses(wordnet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "HELD_OUT_PER_THOUSAND", 0)
    assert read_corpus(wordnet).train == (
        Entry("anew", "again but in a new way"),
        Entry("dog", "a dull unattractive girl"),
        Entry("dog", "a member of the genus Canis"),
        Entry("dog", "a smooth-textured sausage"),
        Entry("dog", "go after with the intent to catch"),
        Entry("domestic dog", "a member of the genus Canis"),
        Entry("galore", "in great numbers"),
    )


def test_no_held_out_gloss_is_trained_on(wordnet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "is_held_out", lambda headword: headword == "domestic dog")
    found = read_corpus(wordnet)
    assert found.held_out == (Entry("domestic dog", "a member of the genus Canis"),)
    assert Entry("dog", "a member of the genus Canis") not in found.train
    assert Entry("dog", "a dull unattractive girl") in found.train


@pytest.mark.parametrize(
    ("gloss", "clean"),
    [
        ('a bark; "the dog barked"; "it barked"', "a bark"),
        ("(botany)  of two   parts;", "(botany) of two parts"),
        ('"a mere example"', ""),
        ("; ".join(["x" * 100] * 3), "; ".join(["x" * 100] * 2)),
        ("x" * 300, ""),
    ],
)
def test_a_gloss_is_cleaned(gloss: str, clean: str) -> None:
    assert clean_gloss(gloss) == clean


def test_a_missing_database_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"index\.noun") as caught:
        read_corpus(tmp_path)
    assert "wordnet-base" in caught.value.hint


def test_about_one_headword_in_a_hundred_is_held_out() -> None:
    held = sum(corpus.is_held_out(f"word{i}") for i in range(20_000))
    assert 150 < held < 250
    assert corpus.is_held_out("Robot") == corpus.is_held_out("robot")
