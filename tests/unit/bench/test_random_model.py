"""Random checkpoints: fit for this project and for the libraries of the field, and equal for equal seeds."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer

from max.bench.random_model import SIZES, _bfloat16, _tokenizer, main, write_checkpoint
from max.models.table import find, load_config
from max.runtime.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random") / "model"
    main([str(folder)])
    return folder


def test_the_checkpoint_fits_its_config(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    checkpoint.check(load_config(find(checkpoint.architecture), checkpoint.config).weights())
    assert AutoConfig.from_pretrained(folder).vocab_size == 4096
    assert sum(tensor.nbytes // 4 for tensor in checkpoint.tensors.values()) == pytest.approx(5e6, rel=0.1)


def test_weights_are_normal_and_norms_are_ones(folder: Path) -> None:
    with safe_open(folder / "model.safetensors", "numpy") as stored:
        assert (stored.get_tensor("model.norm.weight") == 1).all()
        weight = stored.get_tensor("model.layers.1.mlp.gate_proj.weight")
        other = stored.get_tensor("model.layers.2.mlp.gate_proj.weight")
    assert weight.std() == pytest.approx(0.02, rel=0.02) and abs(weight.mean()) < 2e-4
    assert (weight != other).any()


def test_equal_seeds_give_equal_files(folder: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "same")
    write_checkpoint(tmp_path / "other", seed=1)
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / "same" / file.name).read_bytes(), file.name
    weights = "model.safetensors"
    assert (folder / weights).read_bytes() != (tmp_path / "other" / weights).read_bytes()


def test_bfloat16_is_rounded_as_the_library_rounds_it(folder: Path, tmp_path: Path) -> None:
    values = np.concatenate([np.random.default_rng(0).standard_normal(9999), [0.0, -0.0, 1e-40, 3e38]])
    values = values.astype(np.float32)
    np.testing.assert_array_equal(_bfloat16(values), values.astype(ml_dtypes.bfloat16).view(np.uint16))
    write_checkpoint(tmp_path / "half", dtype="bf16")
    half, full = Checkpoint.open(tmp_path / "half"), Checkpoint.open(folder)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert half.tensors[name].dtype == "BF16"
    read = [np.empty((256, 256), np.float32) for _ in range(2)]
    half.read_into(name, read[0])
    full.read_into(name, read[1])
    np.testing.assert_allclose(read[0], read[1], rtol=2**-8)


@pytest.mark.parametrize("size", SIZES)
def test_every_id_is_text_and_every_text_comes_back(size: str) -> None:
    vocab_size = SIZES[size]["vocab_size"]
    special = {"<|im_end|>": vocab_size - 1, "<|im_start|>": vocab_size - 2}
    tokenizer = Tokenizer.from_str(json.dumps(_tokenizer(vocab_size, special)))
    assert tokenizer.get_vocab_size() == vocab_size
    assert all(tokenizer.id_to_token(at) for at in range(vocab_size))
    assert tokenizer.decode([*range(256, vocab_size - 2)]).replace(" ", "").isalpha()
    text = "Grüße, the quick brown fox\n\tjumps 12 times <|im_end|> 漢字"
    ids = tokenizer.encode(text).ids
    assert vocab_size - 1 in ids and len(ids) < len(text.encode())
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_transformers_reads_the_tokenizer_and_its_template(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|begin_of_text|><|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    generation = json.loads((folder / "generation_config.json").read_text())
    assert tokenizer.eos_token_id in generation["eos_token_id"]
    assert tokenizer.bos_token_id == generation["bos_token_id"]
