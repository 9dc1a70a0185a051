"""Loading: the ids are those of the files, the roles those of the configs, and damage is named."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from max import ModelError, RequestError
from max.serve.text_files import FolderText
from max.serve.text_side import TextSide
from max.serve.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def backend_json() -> str:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        ["hello world, hello tokens"],
        trainers.BpeTrainer(
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    return backend.to_str()


@pytest.fixture
def folder(tmp_path: Path, backend_json: str) -> Path:
    (tmp_path / "tokenizer.json").write_text(backend_json)
    return tmp_path


def configure(folder: Path, **config: object) -> Tokenizer:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(FolderText(folder))


def test_round_trip_without_any_config(folder: Path) -> None:
    tokenizer = Tokenizer.load(FolderText(folder))
    text = "hello world — ünïcode 👋"
    ids = tokenizer.encode(text, add_special_tokens=True)
    assert ids[0] == 0
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>" + text
    assert tokenizer.encode(text, add_special_tokens=False) == ids[1:]
    assert tokenizer.eos_id is None


def test_truncation_and_padding_of_the_file_are_not_applied(folder: Path) -> None:
    tokenizer = Tokenizer.load(FolderText(folder))
    assert len(tokenizer.encode("a" * 100, add_special_tokens=False)) == 100
    assert len(tokenizer.encode("a", add_special_tokens=False)) == 1


@pytest.mark.parametrize("eos", ["</s>", {"content": "</s>", "lstrip": False, "__type": "AddedToken"}])
def test_roles_come_from_the_config(folder: Path, eos: object) -> None:
    tokenizer = configure(folder, bos_token="<s>", eos_token=eos)
    assert tokenizer.eos_id == 1
    assert tokenizer.special_ids == {0, 1}
    assert tokenizer.vocab_size == Backend.from_file(str(folder / "tokenizer.json")).get_vocab_size()


def test_roles_come_from_the_special_tokens_map_where_the_config_has_none(folder: Path) -> None:
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "</s>", "eos_token": "</s>"}))
    tokenizer = configure(folder, bos_token="<s>", eos_token=None)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"} and tokenizer.eos_id == 1


def test_a_role_that_the_vocabulary_lacks_has_no_id(folder: Path) -> None:
    assert configure(folder, eos_token="<absent>").eos_id is None


def test_a_plain_token_with_a_role_becomes_special(folder: Path) -> None:
    tokenizer = configure(folder, eos_token="hello")
    assert tokenizer.eos_id in tokenizer.special_ids
    assert tokenizer.decode(tokenizer.encode("hello tokens", add_special_tokens=False)) == " tokens"


@pytest.mark.parametrize("add_bos", [None, True, False])
@pytest.mark.parametrize("add_eos", [None, True, False])
def test_opening_and_closing_tokens_are_those_of_transformers(
    folder: Path, add_bos: bool | None, add_eos: bool | None
) -> None:
    flags = {"add_bos_token": add_bos, "add_eos_token": add_eos}
    given = {key: value for key, value in flags.items() if value is not None}
    tokenizer = configure(folder, bos_token="<s>", eos_token="</s>", **given)
    transformers = pytest.importorskip("transformers")
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    for special in (True, False):
        expected = reference("hello", add_special_tokens=special, truncation=False, padding=False)["input_ids"]
        assert tokenizer.encode("hello", add_special_tokens=special) == expected


def test_tokens_listed_in_the_config_only_are_added_at_their_ids(folder: Path) -> None:
    size = Tokenizer.load(FolderText(folder)).vocab_size
    listed = {str(size): {"content": "<|call|>", "special": True}, str(size + 1): {"content": "<|note|>"}}
    tokenizer = configure(folder, added_tokens_decoder=listed)
    assert tokenizer.encode("<|note|><|call|>", add_special_tokens=False) == [size + 1, size]
    assert size in tokenizer.special_ids and size + 1 not in tokenizer.special_ids


def test_an_id_that_the_files_disagree_about_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="disagree") as caught:
        configure(folder, added_tokens_decoder={"9999": {"content": "<|call|>"}})
    assert caught.value.hint


@pytest.mark.parametrize("listed", [[1], {"x": {"content": "a"}}, {"3000": {}}, {"3000": 7}])
def test_a_damaged_list_of_added_tokens_is_refused(folder: Path, listed: object) -> None:
    with pytest.raises(ModelError, match="added_tokens_decoder"):
        configure(folder, added_tokens_decoder=listed)


def test_a_folder_without_tokenizer_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer\.json") as caught:
        Tokenizer.load(FolderText(tmp_path))
    assert str(tmp_path) in caught.value.message and caught.value.hint


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\xfe", b'{"model": {"type": "Nope"}}'])
def test_a_damaged_tokenizer_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read") as caught:
        Tokenizer.load(FolderText(tmp_path))
    assert caught.value.hint


@pytest.mark.parametrize("content", ["{", "[]", "\udcff"])
def test_a_damaged_config_is_named(folder: Path, content: str) -> None:
    (folder / "tokenizer_config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelError, match=r"tokenizer_config\.json"):
        Tokenizer.load(FolderText(folder))


def test_lone_surrogates_are_refused(folder: Path) -> None:
    with pytest.raises(RequestError, match="character 3"):
        Tokenizer.load(FolderText(folder)).encode("abc\ud800", add_special_tokens=False)


def test_the_tokenizer_needs_neither_transformers_nor_jax(folder: Path) -> None:
    script = (
        "import sys; from max.serve.tokenizer import Tokenizer; from max.serve.text_files import FolderText; "
        f"Tokenizer.load(FolderText({str(folder)!r})).encode('a', add_special_tokens=False); "
        "print([name for name in ('transformers', 'jax', 'fastapi', 'pydantic', 'jinja2') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=folder)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("words", ["a naïve robot", "🤖 日本", "  two  spaces\n", "<|user|> hello"])
def test_bytes_of_tokens_join_to_the_text(text: TextSide, words: str) -> None:
    tokenizer = text.tokenizer
    ids = tokenizer.encode(words, add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, ids)) == words.encode()
    assert tokenizer.token_bytes(10**6) == b""
