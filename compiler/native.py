"""The kernels for CPUs: finds the library that the install built, packs weights for it, and names its XLA handlers.

The library is C++ (compiler/kernels/) without any Python in it, so it is loaded with ctypes. Where it was not built,
`library()` is None and every graph is plain XLA. Imports no jax.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from .. import ConfigError, MaxError
from .sampling import NUMBERS, SETTINGS, mask_words

Encoding = Literal["float32", "bfloat16", "q8_0", "q4_0", "q4_k", "q6_k"]
QuantizedEncoding = Literal["q8_0", "q4_0", "q4_k", "q6_k"]
Epilogue = Literal["none", "bias", "swiglu", "geglu_tanh", "geglu_erf"]
Columns = Literal["plain", "gate", "up"]

ISA_VARIABLE = "MAX_KERNELS_ISA"
ISAS = ("baseline", "avx2", "avx512", "avx512_vnni", "avx512_bf16")
"""The instruction sets that the kernels are compiled for, least first; MAX_KERNELS_ISA forces one, "none" plain XLA."""

HANDLERS = (
    "max_matmul_f32_v2",
    "max_matmul_bf16_v2",
    "max_matmul_q8_0_v2",
    "max_matmul_q4_0_v1",
    "max_matmul_q4_k_v1",
    "max_matmul_q6_k_v1",
    *("max_attention_v2", "max_argmax_v1", "max_sample_v1", "max_logprobs_v1"),
    *("max_rms_norm_v1", "max_add_rms_norm_v1"),
    "max_lazy_zeros_v1",
)
"""The XLA custom calls, each with the version of its arguments; docs/adr/0006 describes them."""

BLOCKS: dict[str, tuple[int, int]] = {"q8_0": (32, 34), "q4_0": (32, 18), "q4_k": (256, 144), "q6_k": (256, 210)}
"""Inputs and bytes of GGUF's blocks, of which the quantized encodings are made."""

_ABI = 3
_SOURCES = ("float32", "bfloat16", "uint8")
_int64, _pointer, _bool = ctypes.c_int64, ctypes.c_void_p, ctypes.c_bool


class _Matmul(ctypes.Structure):
    _fields_ = (
        ("encoding", ctypes.c_int),
        ("epilogue", ctypes.c_int),
        ("x", _pointer),
        ("weights", _pointer),
        ("bias", _pointer),
        ("y", _pointer),
        *((name, _int64) for name in ("num_rows", "num_inputs", "num_outputs", "weight_bytes")),
    )


class _Packing(ctypes.Structure):
    _fields_ = (
        ("encoding", ctypes.c_int),
        ("columns", ctypes.c_int),
        ("source_kind", ctypes.c_int),
        ("source", _pointer),
        *(
            (name, _int64)
            for name in ("input_stride", "output_stride", "num_inputs", "num_columns", "first_column", "total_columns")
        ),
        ("packed", _pointer),
    )


class _Attention(ctypes.Structure):
    _fields_ = (
        *((name, _pointer) for name in ("qkv", "cos", "sin", "page_table", "rows", "positions", "slots")),
        ("pages", _pointer),
        ("out", _pointer),
        *(
            (name, _int64)
            for name in (
                "num_tokens",
                "num_heads",
                "num_kv_heads",
                "head_dim",
                "rotary_dim",
                "num_pages",
                "page_tokens",
                "max_rows",
                "max_pages",
            )
        ),
        ("pages_are_bf16", _bool),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("window", _int64),
        ("sinks", _pointer),
    )


class _Sampling(ctypes.Structure):
    _fields_ = (
        *((name, _pointer) for name in ("logits", "mask", "history", "bias", "settings", "numbers", "ids")),
        *((name, _int64) for name in ("num_rows", "num_columns", "num_adjusted")),
    )


class _Logprobs(ctypes.Structure):
    _fields_ = (
        *((name, _pointer) for name in ("logits", "ids", "chosen", "top_ids", "top")),
        *((name, _int64) for name in ("num_rows", "num_columns", "num_top")),
    )


class _RmsNorm(ctypes.Structure):
    _fields_ = (
        *((name, _pointer) for name in ("x", "delta", "weight", "sum", "y")),
        *((name, _int64) for name in ("num_rows", "width")),
        ("epsilon", ctypes.c_float),
    )


class Library:
    """The loaded kernels; `library()` makes the one of the process."""

    def __init__(self, path: Path) -> None:
        """Loads `path`. Raises MaxError if it is of another version, ConfigError if MAX_KERNELS_ISA cannot be used."""
        self._lib = ctypes.CDLL(str(path))
        for name in (
            "isa",
            "select",
            "pack",
            "quantize",
            "matmul",
            "attention",
            "argmax",
            "sample",
            "logprobs",
            "rms_norm",
        ):
            self._function(name).restype = ctypes.c_char_p
        self._function("packed_bytes").restype = _int64
        self._function("packed_bytes").argtypes = [ctypes.c_int, ctypes.c_int, _int64, _int64]
        if self._function("abi")() != _ABI:
            raise MaxError(f"{path} was built from other sources", "Install the package anew: pip install .")
        self.select("")

    def _function(self, name: str) -> Any:
        return getattr(self._lib, f"max_kernels_{name}")

    @property
    def isa(self) -> str:
        """The instruction set in use, one of ISAS."""
        return self._function("isa")().decode()

    def supports(self, isa: str) -> bool:
        """Whether this CPU can run the kernels for `isa`."""
        return bool(self._function("supports")(isa.encode()))

    def select(self, isa: str) -> None:
        """Uses the kernels for `isa` from now on; "" means those of MAX_KERNELS_ISA or else the CPU's best.

        Raises ConfigError if there is no such instruction set or this CPU lacks it.
        """
        problem = self._function("select")(isa.encode())
        if problem is not None:
            able = ", ".join(name for name in ISAS if self.supports(name))
            raise ConfigError(problem.decode(), f"Unset {ISA_VARIABLE}, or set it to one of: {able}.")

    @property
    def num_threads(self) -> int:
        """Threads that a kernel uses at most: those that were set, or else the CPUs of the process."""
        return self._function("num_threads")()

    def set_num_threads(self, threads: int) -> None:
        """Changes `num_threads`, also for kernels that are in use; 0 means the CPUs of the process."""
        self._function("set_num_threads")(threads)

    def handlers(self) -> dict[str, Any]:
        """The XLA handlers by name, as the capsules that `jax.ffi.register_ffi_target` takes."""
        capsule = ctypes.pythonapi.PyCapsule_New
        capsule.restype, capsule.argtypes = ctypes.py_object, [_pointer, ctypes.c_char_p, _pointer]
        address = {name: ctypes.cast(getattr(self._lib, name), _pointer) for name in HANDLERS}
        return {name: capsule(address[name], b"xla._CUSTOM_CALL_TARGET", None) for name in HANDLERS}

    def packed_bytes(self, encoding: Encoding, inputs: int, outputs: int, *, gated: bool = False) -> int:
        """Bytes of a packed matrix; if `gated`, one of gate and up, each of `outputs` columns."""
        epilogue = get_args(Epilogue).index("swiglu" if gated else "none")
        return self._function("packed_bytes")(get_args(Encoding).index(encoding), epilogue, inputs, outputs)

    def quantize(self, elements: np.ndarray, encoding: QuantizedEncoding) -> np.ndarray:
        """GGUF's blocks of float32 elements (rows, inputs), as (rows, bytes) uint8: what `pack` makes of them.

        q8_0 and q4_0 are those of GGUF's own quantizer; q4_k and q6_k come from a search for scales of least squared
        error. Raises ValueError unless inputs are whole blocks: 32 for q8_0 and q4_0, 256 for q4_k and q6_k.
        """
        block, nbytes = BLOCKS[encoding]
        blocks = np.empty((elements.shape[0], elements.shape[1] // block * nbytes), np.uint8)
        if elements.shape[1] % block:
            raise ValueError(f"{encoding} needs a multiple of {block} inputs")
        arguments = (
            get_args(Encoding).index(encoding),
            _pointer(_address(elements, np.float32)),
            _int64(elements.size),
        )
        _raise(self._function("quantize")(*arguments, _pointer(blocks.ctypes.data)))
        return blocks

    def pack(
        self,
        source: np.ndarray,
        packed: np.ndarray,
        encoding: Encoding,
        *,
        columns: Columns = "plain",
        first_column: int = 0,
        total_columns: int | None = None,
    ) -> None:
        """Writes a matrix, or some of its columns, into packed weights.

        source:        (inputs, outputs) float32 or bfloat16, with any strides: pass the transpose of a checkpoint's;
                       for a quantized encoding also GGUF's blocks of it, contiguous (outputs, bytes of a row) uint8
        packed:        packed_bytes of uint8, of any shape, zeroed before the first of its parts
        columns:       "gate" and "up" for the two halves of a gated layer's matrix
        first_column:  where the columns go in a matrix of `total_columns` that is fused from several
        Raises ValueError if shapes, dtypes or sizes do not fit.
        """
        blocks = source.dtype == np.uint8
        if source.dtype.name not in _SOURCES or (blocks and not (encoding in BLOCKS and source.flags.c_contiguous)):
            raise ValueError(
                f"weights are float32, bfloat16 or blocks of their encoding, not {source.dtype} for {encoding}"
            )
        inputs, outputs = source.shape
        if blocks:
            block, nbytes = BLOCKS[encoding]
            if source.shape[1] % nbytes:
                raise ValueError(f"rows of {encoding} are blocks of {nbytes} bytes, not {source.shape[1]}")
            inputs, outputs = source.shape[1] // nbytes * block, source.shape[0]
        total = outputs if total_columns is None else total_columns
        if packed.nbytes != self.packed_bytes(encoding, inputs, total, gated=columns != "plain"):
            raise ValueError(f"packed weights of {packed.nbytes} bytes do not fit {inputs} inputs, {total} outputs")
        call = _Packing(
            encoding=get_args(Encoding).index(encoding),
            columns=get_args(Columns).index(columns),
            source_kind=_SOURCES.index(source.dtype.name),
            source=source.ctypes.data,
            input_stride=source.strides[0] // source.itemsize,
            output_stride=source.strides[1] // source.itemsize,
            num_inputs=inputs,
            num_columns=outputs,
            first_column=first_column,
            total_columns=total,
            packed=_address(packed, np.uint8, writable=True),
        )
        _raise(self._function("pack")(ctypes.byref(call)))

    def matmul(
        self, x: np.ndarray, packed: np.ndarray, y: np.ndarray, encoding: Encoding, *,
        epilogue: Epilogue = "none", bias: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """Fills y with x @ W without XLA. x: (M, K), y: (M, N), bias: (N,), all float32; raises ValueError."""
        self.matmul_call(x, packed, y, encoding, epilogue=epilogue, bias=bias)()

    def matmul_call(
        self, x: np.ndarray, packed: np.ndarray, y: np.ndarray, encoding: Encoding, *,
        epilogue: Epilogue = "none", bias: np.ndarray | None = None,
    ) -> Callable[[], None]:  # fmt: skip
        """`matmul` with its arguments checked now, to be called many times: the checks take longer than small calls."""
        if x.shape[0] != y.shape[0] or (epilogue == "bias") != (bias is not None):
            raise ValueError("the arguments of the matmul do not fit each other")
        if bias is not None and bias.shape != y.shape[1:]:
            raise ValueError("a bias has one element per output")
        call = _Matmul(
            encoding=get_args(Encoding).index(encoding),
            epilogue=get_args(Epilogue).index(epilogue),
            x=_address(x, np.float32),
            weights=_address(packed, np.uint8),
            bias=None if bias is None else _address(bias, np.float32),
            y=_address(y, np.float32, writable=True),
            num_rows=x.shape[0],
            num_inputs=x.shape[1],
            num_outputs=y.shape[1],
            weight_bytes=packed.nbytes,
        )
        return self._prepared("matmul", call, x, packed, y, bias)

    def rms_norm(
        self, x: np.ndarray, weight: np.ndarray, y: np.ndarray, epsilon: float, *,
        delta: np.ndarray | None = None, total: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """Fills y with the norm of x, or of x + delta, kept in `total`; all (T, D) float32 but weight (D,)."""
        if any(a is not None and a.shape != x.shape for a in (y, delta, total)) or weight.shape != x.shape[1:]:
            raise ValueError("the arguments of the norm do not fit each other")
        call = _RmsNorm(
            x=_address(x, np.float32),
            delta=None if delta is None else _address(delta, np.float32),
            weight=_address(weight, np.float32),
            sum=None if total is None else _address(total, np.float32, writable=True),
            y=_address(y, np.float32, writable=True),
            num_rows=x.shape[0],
            width=x.shape[1],
            epsilon=epsilon,
        )
        _raise(self._function("rms_norm")(ctypes.byref(call)))

    def argmax(self, x: np.ndarray) -> np.ndarray:
        """The index of each row's first highest value, NaN being the highest. x: (R, V) float32; (R,) int32 out."""
        result = np.empty(x.shape[0], np.int32)
        sizes = (_int64(size) for size in x.shape)
        _raise(self._function("argmax")(_pointer(_address(x, np.float32)), *sizes, _pointer(result.ctypes.data)))
        return result

    def sample(
        self, logits: np.ndarray, mask: np.ndarray, history: np.ndarray, bias: np.ndarray, settings: np.ndarray,
        numbers: np.ndarray,
    ) -> np.ndarray:  # fmt: skip
        """Draws one token per row without XLA; shapes and dtypes are those of the sampler graph. (R,) int32 out."""
        rows, columns = logits.shape
        shapes = ((rows, mask_words(columns)), bias.shape, (rows, len(SETTINGS)), (rows, len(NUMBERS)))
        if (mask.shape, history.shape, settings.shape, numbers.shape) != shapes or bias.shape[1] != columns:
            raise ValueError("the arguments of the sampler do not fit each other")
        ids = np.empty(rows, np.int32)
        call = _Sampling(
            logits=_address(logits, np.float32),
            mask=_address(mask, np.int32),
            history=_address(history, np.int32),
            bias=_address(bias, np.float32),
            settings=_address(settings, np.float32),
            numbers=_address(numbers, np.int32),
            ids=ids.ctypes.data,
            num_rows=rows,
            num_columns=columns,
            num_adjusted=bias.shape[0],
        )
        _raise(self._function("sample")(ctypes.byref(call)))
        return ids

    def logprobs(self, logits: np.ndarray, ids: np.ndarray, num_top: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The log-softmax of each row at its id and at its highest values, best first.

        logits: (R, V) float32; ids: (R,) int32
        Returns (R,) float32, (R, num_top) int32 and (R, num_top) float32. Raises ValueError for an id out of range.
        """
        rows, columns = logits.shape
        if ids.shape != (rows,):
            raise ValueError("there is one id per row")
        chosen, top = np.empty(rows, np.float32), np.empty((rows, num_top), np.float32)
        top_ids = np.empty((rows, num_top), np.int32)
        call = _Logprobs(
            logits=_address(logits, np.float32),
            ids=_address(ids, np.int32),
            chosen=chosen.ctypes.data,
            top_ids=top_ids.ctypes.data,
            top=top.ctypes.data,
            num_rows=rows,
            num_columns=columns,
            num_top=num_top,
        )
        _raise(self._function("logprobs")(ctypes.byref(call)))
        return chosen, top_ids, top

    def read(self, memory: np.ndarray) -> None:
        """Reads contiguous memory once, but for a tail below 512 bytes: the bound that a matmul is measured against."""
        self._function("read")(_pointer(_address(memory, memory.dtype)), _int64(memory.nbytes))

    def attention(
        self, qkv: np.ndarray, cos: np.ndarray, sin: np.ndarray, pages: np.ndarray, page_table: np.ndarray,
        rows: np.ndarray, positions: np.ndarray, slots: np.ndarray, out: np.ndarray, *, scale: float,
        softcap: float = 0.0, window: int = 0, sinks: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """Runs the attention of a step without XLA, on pages that it writes to; the shapes are those of the handler."""
        settings: dict[str, Any] = {"scale": scale, "softcap": softcap, "window": window, "sinks": sinks}
        self.attention_call(qkv, cos, sin, pages, page_table, rows, positions, slots, out, **settings)()

    def attention_call(
        self, qkv: np.ndarray, cos: np.ndarray, sin: np.ndarray, pages: np.ndarray, page_table: np.ndarray,
        rows: np.ndarray, positions: np.ndarray, slots: np.ndarray, out: np.ndarray, *, scale: float,
        softcap: float = 0.0, window: int = 0, sinks: np.ndarray | None = None,
    ) -> Callable[[], None]:  # fmt: skip
        """`attention` with its arguments checked now, to be called many times."""
        _, _, kv_heads, page_tokens, head_dim = pages.shape
        tokens = rows.shape[0]
        heads = out.shape[1] // head_dim
        shapes = ((tokens, (heads + 2 * kv_heads) * head_dim), (tokens,), (tokens,), (tokens, heads * head_dim))
        if (qkv.shape, positions.shape, slots.shape, out.shape) != shapes or cos.shape != sin.shape:
            raise ValueError("the arguments of the attention do not fit each other")
        if sinks is not None and sinks.shape != (heads,):
            raise ValueError("there is one sink per query head")
        call = _Attention(
            qkv=_address(qkv, np.float32),
            cos=_address(cos, np.float32),
            sin=_address(sin, np.float32),
            page_table=_address(page_table, np.int32),
            rows=_address(rows, np.int32),
            positions=_address(positions, np.int32),
            slots=_address(slots, np.int32),
            pages=_address(pages, pages.dtype, writable=True),
            out=_address(out, np.float32, writable=True),
            num_tokens=tokens,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rotary_dim=2 * cos.shape[1],
            num_pages=pages.shape[0],
            page_tokens=page_tokens,
            max_rows=page_table.shape[0],
            max_pages=page_table.shape[1],
            pages_are_bf16=pages.dtype.name == "bfloat16",
            scale=scale,
            softcap=softcap,
            window=window,
            sinks=None if sinks is None else _address(sinks, np.float32),
        )
        return self._prepared("attention", call, qkv, cos, sin, pages, page_table, rows, positions, slots, out)

    def _prepared(self, name: str, call: ctypes.Structure, *memory: np.ndarray | None) -> Callable[[], None]:
        """A call of a function with this structure; keeps the arrays alive that it points into."""
        function, pointer = self._function(name), ctypes.byref(call)

        def run(_kept: object = memory) -> None:
            _raise(function(pointer))

        return run


def _address(array: np.ndarray, dtype: Any, writable: bool = False) -> int:
    if array.dtype != dtype or not array.flags.c_contiguous or (writable and not array.flags.writeable):
        raise ValueError(f"expected a contiguous array of {np.dtype(dtype)}, got {array.dtype}")
    return array.ctypes.data


def _raise(problem: bytes | None) -> None:
    if problem is not None:
        raise ValueError(problem.decode())


def library_path() -> Path | None:
    """The library beside this file, if the install built it."""
    return next(iter(sorted(Path(__file__).parent.glob("_kernels*.so"))), None)


def how_to_get() -> str:
    """What to do where `library()` is None."""
    if library_path() is not None:
        return f"Unset {ISA_VARIABLE}, which turns the kernels off."
    return "Install a C++ compiler (g++ or clang++), then install the package anew."


@cache
def library() -> Library | None:
    """The kernels of this process; None where the install found no compiler, or where MAX_KERNELS_ISA is "none".

    Raises what `Library` raises.
    """
    path = None if os.environ.get(ISA_VARIABLE) == "none" else library_path()
    return Library(path) if path is not None else None
