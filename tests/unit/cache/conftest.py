"""Stores in a temporary folder, small artifacts to put into them, and one good file of every format."""

import io
import random
from pathlib import Path

import numpy as np
import pytest
import xxhash
from pydantic import ByteSize

from max.cache import mef
from max.cache.binding import Binding, BoundFile, checkpoint_identity
from max.cache.config import CacheConfig, CachePolicy
from max.cache.key import make_key
from max.cache.mef import MefWriter
from max.cache.store import Store
from max.runtime.arena import place
from max.runtime.prepared_format import CHUNK_BYTES, HEADER_BYTES, write_at, write_contents


@pytest.fixture
def open_store(tmp_path):
    """A function that opens a store on one folder, as another process would."""

    def opener(policy: CachePolicy = "on", root: Path = tmp_path / "cache", size: int = 10**9) -> Store:
        return Store.open(CacheConfig(cache_dir=root, cache_policy=policy, max_cache_size=ByteSize(size)))

    return opener


@pytest.fixture
def make_artifact():
    """A function that gives the bytes of a small artifact; each text and size makes another one."""

    def maker(text: str = "module", size: int = 0) -> bytes:
        file = io.BytesIO()
        with mef.MefWriter(file) as writer:
            writer.add(mef.MODULE, "text", text.encode(), codec="none")
            if size:
                writer.add(mef.NATIVE, "step", bytes(size), codec="none")
            writer.finish()
        return file.getvalue()

    return maker


@pytest.fixture(scope="session")
def mef_bytes() -> bytes:
    """An artifact with sections of every kind of codec."""
    file = io.BytesIO()
    with MefWriter(file) as writer:
        writer.add_json(mef.MANIFEST, "", {"graphs": {f"step_t{n}": [n] * 20 for n in range(30)}})
        writer.add(mef.MODULE, "text", random.Random(0).randbytes(3000))
        writer.add(mef.JAXPR, "a", b"let in " * 300)
        writer.add(mef.NATIVE, "step", random.Random(1).randbytes(9000), target="cpu", codec="none")
        writer.finish()
    return file.getvalue()


@pytest.fixture(scope="session")
def binding_bytes() -> bytes:
    """A binding as it lies in the store."""
    key = make_key({"model": {"layers": 2}, "limits": list(range(30))})
    return Binding(
        digest="d" * 32, key=key.digest, factors=key.factors,
        checkpoint=checkpoint_identity({"path": "/m", "files": [], "sha256": "a" * 64}),
        mef="b" * 64, prepared="c" * 64, files=(BoundFile("/m/tokenizer.json", "e" * 64),), stop_token_ids=(2,),
        generation={"temperature": 0.7}, max_length=512, architecture="Llama", created=1.5, versions={"jax": "1"},
    ).encoded()  # fmt: skip


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, bytes]:
    """A file of prepared weights, its id, and its bytes."""
    path = tmp_path_factory.mktemp("weights") / "w"
    slots = place([("a", (40, 30), "float32"), ("b", (5000,), "uint8")])
    data = np.zeros(slots[-1].stop, np.uint8)
    data[:4800] = np.frombuffer(random.Random(2).randbytes(4800), np.uint8)
    with open(path, "xb", buffering=0) as file:
        write_at(file.fileno(), data.data, HEADER_BYTES)
        digests = [
            xxhash.xxh3_64_intdigest(data[at : at + CHUNK_BYTES].data) for at in range(0, len(data), CHUNK_BYTES)
        ]
        identity = write_contents(file.fileno(), slots, digests)
    return path, identity, path.read_bytes()
