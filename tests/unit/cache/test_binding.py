"""Bindings of checkpoints to artifacts."""

import hashlib
import json

import pytest

from max import CacheError
from max.cache.binding import Binding, BoundFile, binding_digest, checkpoint_identity
from max.cache.canonical import canonical_json
from max.cache.key import make_key
from max.cache.record import seal

IDENTITY = {
    "path": "/models/tiny",
    "files": [{"name": "model.safetensors", "bytes": 1000, "mtime_ns": 10**18}],
    "sha256": "a" * 64,
}


def make_binding(**changes) -> Binding:
    factors = {"model": {"layers": 2}, "buckets": [1, 2]}
    fields = {
        "digest": binding_digest(IDENTITY, {"max_length": 512}),
        "key": make_key(factors).digest,
        "factors": factors,
        "checkpoint": checkpoint_identity(IDENTITY),
        "mef": "b" * 64,
        "prepared": "c" * 64,
        "files": (),
        "stop_token_ids": (2, 128009),
        "generation": {"temperature": 0.6, "top_p": 0.9},
        "max_length": 512,
        "architecture": "LlamaForCausalLM",
        "created": 1.0,
        "versions": {"jax": "0.11.2"},
    }
    return Binding(**(fields | changes))


def test_round_trip():
    binding = make_binding()
    assert Binding.decoded(binding.encoded()) == binding


def test_equal_bindings_give_equal_bytes():
    assert make_binding().encoded() == make_binding().encoded()


def test_the_digest_follows_the_checkpoint_and_the_settings():
    digests = {
        binding_digest(IDENTITY, {"max_length": 512}),
        binding_digest(IDENTITY, {"max_length": 256}),
        binding_digest(IDENTITY | {"files": [IDENTITY["files"][0] | {"mtime_ns": 5}]}, {"max_length": 512}),
    }
    assert len(digests) == 3
    assert all(len(digest) == 32 for digest in digests)


@pytest.mark.parametrize(
    "changes",
    [
        {"digest": "../../etc/passwd"},
        {"mef": "b" * 63},
        {"stop_token_ids": ["2"]},
        {"max_length": 0},
        {"checkpoint": {}},
        {"factors": {"model": {"layers": 3}}},
        {"format": 2},
        {"unknown": 1},
    ],
)
def test_damage_is_a_cache_error(changes):
    data = seal(canonical_json(json.loads(make_binding().encoded())["record"] | changes))
    with pytest.raises(CacheError, match=r"some\.json is damaged"):
        Binding.decoded(data, "some.json")


def test_every_truncation_is_a_cache_error():
    data = make_binding().encoded()
    for length in range(len(data)):
        with pytest.raises(CacheError):
            Binding.decoded(data[:length])


def test_a_strange_identity_cannot_be_bound():
    with pytest.raises(CacheError, match="cannot be bound"):
        checkpoint_identity({"path": 1})


def test_changed_files_are_found_by_content(tmp_path):
    paths = [tmp_path / name for name in ("tokenizer.json", "chat_template.jinja", "tokenizer_config.json")]
    for path in paths:
        path.write_text(path.name)
    bound = tuple(BoundFile.of(path) for path in paths)
    assert bound[0].sha256 == hashlib.sha256(b"tokenizer.json").hexdigest()
    binding = make_binding(files=bound)
    assert binding.changed_files() == []
    paths[1].write_text("another template")
    paths[2].unlink()
    assert binding.changed_files() == [str(paths[1]), str(paths[2])]
