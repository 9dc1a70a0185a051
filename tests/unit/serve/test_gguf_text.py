"""The text side of a GGUF file beside the tokenizer.json that it was made from."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from max import MaxError, ModelError
from max.bench import random_model
from max.bench.gguf_export import write_gguf
from max.cache.config import CacheConfig, CachePolicy
from max.runtime import gguf_file
from max.runtime.checkpoint import Checkpoint
from max.runtime.gguf_file import Strings
from max.serve import gguf_text
from max.serve.text_side import TextSide

SIZE = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 1000,
}
BUILT_IN = Path(__file__).parents[3] / "models" / "builtin"


@pytest.fixture(scope="module", params=["random", "built-in"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[TextSide, TextSide]:
    """The text sides of a folder and of the GGUF file made from it."""
    work = tmp_path_factory.mktemp("text")
    folder = BUILT_IN
    if request.param == "random":
        random_model.SIZES["tests"] = SIZE
        folder = work / "model"
        random_model.write_checkpoint(folder, "tests")
        del random_model.SIZES["tests"]
    write_gguf(folder, work / "m.gguf", "f16")
    return TextSide.load(folder), TextSide.load(work / "m.gguf")


@settings(max_examples=5 * settings().max_examples)
@given(text=st.text() | st.text("abcdefgh 0123.,'<|>\n") | st.sampled_from(["<|end|> a", "<|im_end|>x<|im_start|>"]))
def test_text_becomes_the_same_tokens(pair: tuple[TextSide, TextSide], text: str) -> None:
    ours, theirs = pair[1].tokenizer, pair[0].tokenizer
    for special in (True, False):
        ids = theirs.encode(text, add_special_tokens=special)
        assert ours.encode(text, add_special_tokens=special) == ids
        assert ours.decode(ids, skip_special_tokens=special) == theirs.decode(ids, skip_special_tokens=special)


def test_templates_stop_tokens_and_special_tokens_are_the_same(pair: tuple[TextSide, TextSide]) -> None:
    folder, file = pair
    assert file.prompt_ids("hello", apply_chat_template=None) == folder.prompt_ids("hello", apply_chat_template=None)
    assert file.defaults.stop_token_ids == folder.defaults.stop_token_ids
    assert file.tokenizer.eos_id == folder.tokenizer.eos_id
    assert file.tokenizer.special_ids == folder.tokenizer.special_ids
    assert file.files == []


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_gguf(BUILT_IN, tmp_path / "m.gguf", "f16")
    return tmp_path / "m.gguf"


def kept(cache: CacheConfig) -> list[Path]:
    """The tokenizers; the other thing that is kept of a file is the index of its header."""
    return [path for path in (cache.folder / "derived").iterdir() if b'{"nbytes"' not in path.read_bytes()[:64]]


def ids(file: Path, cache: CacheConfig) -> list[int]:
    return TextSide.load(file, cache=cache).tokenizer.encode("<|im_start|>It rained, twice!", add_special_tokens=True)


def refuse(*_: object) -> None:
    raise AssertionError("the tokenizer was built again")


def test_a_tokenizer_is_built_once(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = CacheConfig(cache_dir=tmp_path / "cache")
    wanted = TextSide.load(BUILT_IN).tokenizer.encode("<|im_start|>It rained, twice!", add_special_tokens=True)
    assert ids(file, cache) == wanted and len(kept(cache)) == 1
    with monkeypatch.context() as changed:
        changed.setattr(gguf_text, "build_tokenizer", refuse)
        changed.setattr(Strings, "__iter__", refuse)
        changed.setattr(gguf_file, "read_header", refuse)
        assert ids(file, cache) == wanted
        again, folder = TextSide.load(file, cache=cache), TextSide.load(BUILT_IN)
        assert again.defaults.stop_token_ids == folder.defaults.stop_token_ids
        assert again.prompt_ids("hello", apply_chat_template=True) == folder.prompt_ids(
            "hello", apply_chat_template=True
        )
        Checkpoint.open(file, cache=cache)
        changed.undo()
        changed.setattr(gguf_text, "build_tokenizer", refuse)
        with pytest.raises(ModelError, match="built again"):
            ids(file, CacheConfig(cache_dir=tmp_path / "cache", cache_policy="redo"))
    with pytest.raises(ModelError, match="built again"), monkeypatch.context() as changed:
        changed.setattr(gguf_text, "build_tokenizer", refuse)
        changed.setattr(gguf_text.tokenizers, "__version__", "another")
        ids(file, cache)


@pytest.mark.parametrize("policy", ["off", "readonly"])
def test_a_cache_that_is_not_filled_keeps_no_tokenizer(file: Path, tmp_path: Path, policy: CachePolicy) -> None:
    cache = CacheConfig(cache_dir=tmp_path / "cache", cache_policy=policy)
    assert ids(file, cache) and not (tmp_path / "cache" / "derived").exists()


def test_a_damaged_tokenizer_is_built_again(file: Path, tmp_path: Path) -> None:
    cache = CacheConfig(cache_dir=tmp_path / "cache")
    wanted = ids(file, cache)
    (path,) = kept(cache)
    sound = path.read_bytes()
    other = CacheConfig(cache_dir=tmp_path / "other")
    random_model.SIZES["tests"] = SIZE
    random_model.write_checkpoint(tmp_path / "model", "tests")
    del random_model.SIZES["tests"]
    write_gguf(tmp_path / "model", tmp_path / "other.gguf", "f16")
    ids(tmp_path / "other.gguf", other)
    (foreign,) = kept(other)
    flipped = [
        sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :] for at in (0, 31, 32, len(sound) // 2, -1 % len(sound))
    ]
    unusable = hashlib.sha256(path.name.encode() + b"{}").digest() + b"{}"
    damages = [*flipped, b"", sound[:10], sound[:32], sound[:-1], sound + b" ", foreign.read_bytes(), unusable]
    for count, content in enumerate(damages, 1):
        path.write_bytes(content)
        assert ids(file, cache) == wanted
        assert path.read_bytes() == sound
        assert len(list((cache.folder / "quarantine").iterdir())) == count


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small file up to a little behind its header, which is where damage can be noticed."""
    work = tmp_path_factory.mktemp("small")
    random_model.SIZES["tests"] = SIZE | {"vocab_size": 280}
    random_model.write_checkpoint(work / "model", "tests")
    del random_model.SIZES["tests"]
    write_gguf(work / "model", work / "m.gguf", "q8_0")
    return (work / "m.gguf").read_bytes()


@settings(max_examples=3 * settings().max_examples, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=3),
    cut=st.none() | st.floats(0, 1, exclude_max=True),
)
def test_a_damaged_file_is_an_error_in_two_lines_or_another_sound_file(
    tmp_path: Path, small_file: bytes, changes: list[tuple[float, int]], cut: float | None
) -> None:
    content, path = bytearray(small_file), tmp_path / "m.gguf"
    header = small_file.rindex(b"output_norm.weight") + 64
    for at, value in changes:
        content[int(at * header)] = value
    path.write_bytes(content if cut is None else content[: int(cut * len(content))])
    for read in (Checkpoint.open, TextSide.load):
        try:
            read(path)
        except MaxError as error:
            assert error.message and error.hint and "\n" not in error.message
