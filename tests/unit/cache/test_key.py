"""Keys, their factors, and explaining a miss."""

import os
import subprocess
import sys

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from max import CacheError
from max.cache.key import Absent, Difference, explain, make_key, source_digest, toolchain

scalars = st.booleans() | st.integers(-3, 3) | st.sampled_from([0.0, 1.0, 0.5]) | st.sampled_from(["", "a", "1"])
factors = st.dictionaries(
    st.sampled_from("abc"), scalars | st.lists(scalars, max_size=2) | st.dictionaries(st.sampled_from("xy"), scalars)
)


def test_digest_is_xxh3_of_the_canonical_json():
    key = make_key({"b": (1, 2), "a": {"c": True}})
    assert key.digest == xxhash.xxh3_128_hexdigest(b'{"a":{"c":true},"b":[1,2]}') == str(key)
    assert key.factors == {"b": [1, 2], "a": {"c": True}}


@given(factors, factors)
def test_differences_explain_exactly_the_different_digests(wanted, have):
    assert bool(explain(wanted, have)) == (make_key(wanted) != make_key(have))


def test_differences_are_dotted_and_complete():
    wanted = {"model": {"layers": 4, "width": 8}, "buckets": [1, 2], "target": "cpu"}
    have = {"model": {"layers": 2, "width": 8}, "buckets": [1], "plugin": "x"}
    assert explain(wanted, have) == [
        Difference("buckets", [1, 2], [1]),
        Difference("model.layers", 4, 2),
        Difference("plugin", Absent.ABSENT, "x"),
        Difference("target", "cpu", Absent.ABSENT),
    ]
    assert str(Difference("model.layers", 4, 2)) == "model.layers: 4 wanted, 2 stored"
    assert str(Difference("target", "cpu", Absent.ABSENT)) == "target: cpu wanted, (absent) stored"


def test_values_that_python_calls_equal_are_told_apart():
    assert explain({"a": 1, "b": True, "c": [0]}, {"a": 1.0, "b": 1, "c": [False]}) == [
        Difference("a", 1, 1.0),
        Difference("b", True, 1),
        Difference("c", [0], [False]),
    ]


def test_factors_that_json_cannot_hold_are_refused_by_name():
    with pytest.raises(TypeError, match=r"factors\.mesh"):
        make_key({"mesh": object()})


def make_sources(folder):
    (folder / "models" / "inner").mkdir(parents=True)
    (folder / "models" / "llama.py").write_text("one")
    (folder / "models" / "inner" / "kernel.cpp").write_text("two")
    return folder / "models"


def test_source_digest_follows_content_and_names_only(tmp_path):
    first, second = make_sources(tmp_path / "here"), make_sources(tmp_path / "there")
    digest = source_digest([first])
    os.utime(second / "llama.py", (1, 1))
    (second / "notes.md").write_text("not a source")
    (second / "__pycache__").mkdir()
    (second / "__pycache__" / "llama.cpython-312.pyc").write_bytes(b"x")
    (second / ".ipynb_checkpoints").mkdir()
    (second / ".ipynb_checkpoints" / "old.py").write_text("hidden")
    assert source_digest([second]) == digest

    (second / "inner" / "kernel.cpp").write_text("changed")
    assert source_digest([second]) != digest
    (first / "llama.py").rename(first / "inner" / "llama.py")
    assert source_digest([first]) != digest


def test_source_digest_leaves_out_what_it_is_told_to(tmp_path):
    folder = make_sources(tmp_path)
    digest = source_digest([folder], without=[folder / "inner"])
    assert digest != source_digest([folder])
    (folder / "inner" / "kernel.cpp").write_text("changed")
    assert source_digest([folder], without=[folder / "inner"]) == digest
    (folder / "llama.py").write_text("changed")
    assert source_digest([folder], without=[folder / "inner"]) != digest


def test_source_digest_does_not_confuse_a_name_with_content(tmp_path):
    for name, parts in {"a": ("x", "yz"), "b": ("xy", "z")}.items():
        (tmp_path / name / "m").mkdir(parents=True)
        (tmp_path / name / "m" / "1.py").write_text(parts[0])
        (tmp_path / name / "m" / "2.py").write_text(parts[1])
    assert source_digest([tmp_path / "a" / "m"]) != source_digest([tmp_path / "b" / "m"])


def test_source_digest_takes_files_and_any_order(tmp_path):
    folder = make_sources(tmp_path)
    file = tmp_path / "outside.py"
    file.write_text("three")
    assert source_digest([folder, file]) == source_digest([file, folder])
    assert source_digest([folder, file]) != source_digest([folder])


@pytest.mark.parametrize("missing", ["nowhere", "empty"])
def test_source_digest_of_nothing_is_an_error(tmp_path, missing):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CacheError, match="holds no source files"):
        source_digest([tmp_path / missing])


def test_toolchain_names_versions():
    import importlib.metadata

    versions = toolchain()
    assert versions["jax"] == importlib.metadata.version("jax")
    assert versions.keys() == {"mef", "jax", "jaxlib", "flax"}


def test_nothing_heavy_is_imported(tmp_path):
    script = (
        "import sys, max.cache.key, max.cache.store; max.cache.key.toolchain();"
        "print(sorted({'jax', 'flax', 'numpy', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
