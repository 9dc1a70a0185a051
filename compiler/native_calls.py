"""Kernels called without XLA: what tests compare, benches time, and nothing on a request's way needs.

Every call checks shapes and dtypes first; the arguments are those of the XLA handlers in `native.HANDLERS`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, get_args

import numpy as np

from .native_functions import Encoding, Epilogue, Functions, address, check, int64, pointer
from .sampling import NUMBERS, SETTINGS, mask_words


class _Matmul(ctypes.Structure):
    _fields_ = (
        ("encoding", ctypes.c_int),
        ("epilogue", ctypes.c_int),
        ("x", pointer),
        ("weights", pointer),
        ("bias", pointer),
        ("y", pointer),
        *((name, int64) for name in ("num_rows", "num_inputs", "num_outputs", "weight_bytes")),
    )


class _Embedding(ctypes.Structure):
    _fields_ = (
        ("encoding", ctypes.c_int),
        ("ids", pointer),
        ("weights", pointer),
        ("y", pointer),
        *((name, int64) for name in ("num_tokens", "num_inputs", "num_outputs", "weight_bytes")),
    )


class _Attention(ctypes.Structure):
    _fields_ = (
        *((name, pointer) for name in ("qkv", "cos", "sin", "page_table", "rows", "positions", "slots")),
        ("pages", pointer),
        ("out", pointer),
        *(
            (name, int64)
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
        ("pages_are_bf16", ctypes.c_bool),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("window", int64),
        ("sinks", pointer),
    )


class _Sampling(ctypes.Structure):
    _fields_ = (
        *((name, pointer) for name in ("logits", "mask", "history", "bias", "settings", "numbers", "ids")),
        *((name, int64) for name in ("num_rows", "num_columns", "num_adjusted")),
    )


class _Logprobs(ctypes.Structure):
    _fields_ = (
        *((name, pointer) for name in ("logits", "ids", "chosen", "top_ids", "top")),
        *((name, int64) for name in ("num_rows", "num_columns", "num_top")),
    )


class _RmsNorm(ctypes.Structure):
    _fields_ = (
        *((name, pointer) for name in ("x", "delta", "weight", "sum", "y")),
        *((name, int64) for name in ("num_rows", "width")),
        ("epsilon", ctypes.c_float),
    )


class DirectCalls(Functions):
    """The part of the library that computes."""

    TEXTS = ("matmul", "embed", "attention", "argmax", "sample", "logprobs", "rms_norm")

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
            x=address(x, np.float32),
            weights=address(packed, np.uint8),
            bias=None if bias is None else address(bias, np.float32),
            y=address(y, np.float32, writable=True),
            num_rows=x.shape[0],
            num_inputs=x.shape[1],
            num_outputs=y.shape[1],
            weight_bytes=packed.nbytes,
        )
        return self._prepared("matmul", call, x, packed, y, bias)

    def embed(self, ids: np.ndarray, packed: np.ndarray, outputs: int, y: np.ndarray, encoding: Encoding) -> None:
        """Fills y (T, K) float32 with columns `ids` (T,) int32 of a packed (K, outputs) matrix; raises ValueError."""
        if ids.shape != y.shape[:1]:
            raise ValueError("an embedding has one row per id")
        call = _Embedding(
            encoding=get_args(Encoding).index(encoding),
            ids=address(ids, np.int32),
            weights=address(packed, np.uint8),
            y=address(y, np.float32, writable=True),
            num_tokens=y.shape[0],
            num_inputs=y.shape[1],
            num_outputs=outputs,
            weight_bytes=packed.nbytes,
        )
        check(self.function("embed")(ctypes.byref(call)))

    def rms_norm(
        self, x: np.ndarray, weight: np.ndarray, y: np.ndarray, epsilon: float, *,
        delta: np.ndarray | None = None, total: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """Fills y with the norm of x, or of x + delta, kept in `total`; all (T, D) float32 but weight (D,)."""
        if any(a is not None and a.shape != x.shape for a in (y, delta, total)) or weight.shape != x.shape[1:]:
            raise ValueError("the arguments of the norm do not fit each other")
        call = _RmsNorm(
            x=address(x, np.float32),
            delta=None if delta is None else address(delta, np.float32),
            weight=address(weight, np.float32),
            sum=None if total is None else address(total, np.float32, writable=True),
            y=address(y, np.float32, writable=True),
            num_rows=x.shape[0],
            width=x.shape[1],
            epsilon=epsilon,
        )
        check(self.function("rms_norm")(ctypes.byref(call)))

    def argmax(self, x: np.ndarray) -> np.ndarray:
        """The index of each row's first highest value, -1 for one with a NaN. x: (R, V) float32; (R,) int32 out."""
        result = np.empty(x.shape[0], np.int32)
        sizes = (int64(size) for size in x.shape)
        check(self.function("argmax")(pointer(address(x, np.float32)), *sizes, pointer(result.ctypes.data)))
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
            logits=address(logits, np.float32),
            mask=address(mask, np.int32),
            history=address(history, np.int32),
            bias=address(bias, np.float32),
            settings=address(settings, np.float32),
            numbers=address(numbers, np.int32),
            ids=ids.ctypes.data,
            num_rows=rows,
            num_columns=columns,
            num_adjusted=bias.shape[0],
        )
        check(self.function("sample")(ctypes.byref(call)))
        return ids

    def logprobs(self, logits: np.ndarray, ids: np.ndarray, num_top: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The log-softmax of each row at its id and at its highest values, best first.

        logits: (R, V) float32; ids: (R,) int32, -1 of a row that gave no token counting as 0
        Returns (R,) float32, (R, num_top) int32 and (R, num_top) float32. Raises ValueError for an id out of range.
        """
        rows, columns = logits.shape
        if ids.shape != (rows,):
            raise ValueError("there is one id per row")
        chosen, top = np.empty(rows, np.float32), np.empty((rows, num_top), np.float32)
        top_ids = np.empty((rows, num_top), np.int32)
        call = _Logprobs(
            logits=address(logits, np.float32),
            ids=address(ids, np.int32),
            chosen=chosen.ctypes.data,
            top_ids=top_ids.ctypes.data,
            top=top.ctypes.data,
            num_rows=rows,
            num_columns=columns,
            num_top=num_top,
        )
        check(self.function("logprobs")(ctypes.byref(call)))
        return chosen, top_ids, top

    def read(self, memory: np.ndarray) -> None:
        """Reads contiguous memory once, but for a tail below 512 bytes: the bound that a matmul is measured against."""
        self.function("read")(pointer(address(memory, memory.dtype)), int64(memory.nbytes))

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
            qkv=address(qkv, np.float32),
            cos=address(cos, np.float32),
            sin=address(sin, np.float32),
            page_table=address(page_table, np.int32),
            rows=address(rows, np.int32),
            positions=address(positions, np.int32),
            slots=address(slots, np.int32),
            pages=address(pages, pages.dtype, writable=True),
            out=address(out, np.float32, writable=True),
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
            sinks=None if sinks is None else address(sinks, np.float32),
        )
        return self._prepared("attention", call, qkv, cos, sin, pages, page_table, rows, positions, slots, out)

    def _prepared(self, name: str, call: ctypes.Structure, *memory: np.ndarray | None) -> Callable[[], None]:
        """A call of a function with this structure; keeps the arrays alive that it points into."""
        function, argument = self.function(name), ctypes.byref(call)

        def run(_kept: object = memory) -> None:
            check(function(argument))

        return run
