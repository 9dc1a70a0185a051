"""What was found in a GGUF header, kept so that the next start need not walk through it: a vocabulary of today is
400,000 strings, each of which says where the next one begins.

An index is kept under what the file begins with, its size and the code that made it, and used if the whole header has
the sha256 that it had then. Imports no jax.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import CacheError
from ..cache.config import CacheConfig
from ..cache.key import make_key, source_digest
from ..cache.store import Store
from . import gguf_file
from .gguf_file import Header, LongArray, Place
from .safetensors_file import TensorInfo

_BEGINNING_BYTES = 1 << 16


def read_header(file: Path, cache: CacheConfig | None = None) -> Header:
    """`gguf_file.read_header`, by the index where `cache` has one; raises as that does."""
    if cache is None:
        return gguf_file.read_header(file)
    try:
        name = _name(file)
    except OSError:
        return gguf_file.read_header(file)  # which says what is wrong with it
    store = Store.open(cache)
    kept = store.lookup_derived(name)
    if kept is not None:
        try:
            header = _indexed(file, json.loads(kept))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            store.quarantine_derived(name, CacheError(f"a kept header cannot be read: {error!r}", ""))
        else:
            if header is not None:
                return header
    header = gguf_file.read_header(file)
    store.publish_derived(name, _index_of(header), "header of a GGUF file")
    return header


def _name(file: Path) -> str:
    with file.open("rb") as stream:
        beginning = hashlib.sha256(stream.read(_BEGINNING_BYTES)).hexdigest()
    sources = source_digest([Path(__file__), Path(__file__).with_name("gguf_file.py")])
    return make_key({"header": beginning, "bytes": file.stat().st_size, "sources": sources}).digest


def _index_of(header: Header) -> bytes:
    arrays = {key: asdict(value.place) for key, value in header.metadata.items() if isinstance(value, LongArray)}
    index = {
        "nbytes": header.nbytes,
        "sha256": header.sha256,
        "metadata": {key: value for key, value in header.metadata.items() if key not in arrays},
        "arrays": arrays,
        "order": list(header.metadata),
        "tensors": {name: [at.dtype, at.shape, at.offset, at.nbytes] for name, at in header.tensors.items()},
    }
    return json.dumps(index).encode()


def _indexed(file: Path, index: dict[str, Any]) -> Header | None:
    """The header that the index is of; None where the file has another one by now."""
    nbytes, sha256 = index["nbytes"], index["sha256"]
    try:
        with file.open("rb") as stream:
            raw = stream.read(nbytes)
    except OSError:
        return None
    if hashlib.sha256(raw).hexdigest() != sha256:
        return None
    places = {key: Place(**place) for key, place in index["arrays"].items()}
    arrays = {key: LongArray.of(raw[place.at : place.at + place.nbytes], place) for key, place in places.items()}
    found = index["metadata"] | arrays
    tensors = {
        name: TensorInfo(file, dtype, tuple(shape), offset, size)
        for name, (dtype, shape, offset, size) in index["tensors"].items()
    }
    return Header(file, {key: found[key] for key in index["order"]}, tensors, nbytes, sha256)
