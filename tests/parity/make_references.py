"""Runs transformers on torch over the seeded checkpoints and stores what it answers (README.md says how to run it)."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from seeded import seeded_checkpoint, seeded_tensor, seeded_tokens
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

HERE = Path(__file__).parent
PROMPT_TOKENS = 40
NEW_TOKENS = 128
# Rounding may choose another token where the two best are nearer than this share of the logits' standard deviation.
LEAST_MARGIN = 4e-3
MAX_PROMPTS = 50
# Row lengths relative to max_position_embeddings for which the frequencies of `dynamic` are stored.
DYNAMIC_LENGTHS = (0.5, 1.0, 1.25, 2.0, 3.0)
# In the order in which transformers applies them.
PROCESSORS = {
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}


def llama_reference(name: str, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """The answer to the first seeded prompt whose greedy continuation is neither a near-tie nor a short cycle."""
    for attempt in range(MAX_PROMPTS):
        prompt = seeded_tokens(f"prompt {attempt} of {name}", PROMPT_TOKENS, config["vocab_size"])
        answer = run_llama(config, prompt)
        spread = float(answer["logits"].std())
        margin = float(answer["margins"].min()) / spread
        tail = answer["greedy"][-66:].tolist()
        distinct = len(set(zip(tail, tail[1:], tail[2:], strict=False)))
        if 1 <= spread <= 5 and margin >= LEAST_MARGIN and distinct >= 56:
            print(f"{name}: prompt {attempt}, logits std {spread:.2f}, least margin {margin:.4f} of it, ", end="")
            print(f"{distinct} of the last 64 trigrams differ")
            return answer
    raise SystemExit(f"{name}: none of {MAX_PROMPTS} prompts gives a reference that proves enough")


def run_llama(config: dict[str, Any], prompt: np.ndarray) -> dict[str, np.ndarray]:
    """Full-forward logits and greedy continuation, float32 with eager attention on the CPU.

    A fresh model each time: with `dynamic` it keeps the frequencies of the longest row that it has seen.
    """
    with tempfile.TemporaryDirectory() as folder:
        seeded_checkpoint(config, Path(folder))
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids = torch.from_numpy(prompt)[None]
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0].numpy()
        generated = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            use_cache=True,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    steps = torch.cat(generated.logits).numpy()
    ranked = np.sort(steps, axis=-1)
    return {
        "prompt": prompt.astype(np.int32),
        "logits": logits,
        "greedy": generated.sequences[0, PROMPT_TOKENS:].numpy().astype(np.int32),
        "margins": ranked[:, -1] - ranked[:, -2],
        "last_logits": steps[-1],
    }


def rope_reference(raw: dict[str, Any]) -> dict[str, np.ndarray]:
    """Inverse frequencies and the factor on cos and sin; for `dynamic` also the frequencies of longer rows."""
    config = LlamaConfig(hidden_size=4 * raw["head_dim"], num_attention_heads=4, **json.loads(json.dumps(raw)))
    rotary = LlamaRotaryEmbedding(config)
    answer = {
        "inverse_frequencies": rotary.inv_freq.numpy().copy(),
        "scale": np.float64(rotary.attention_scaling),
    }
    if rotary.rope_type == "dynamic":
        lengths = [int(share * raw["max_position_embeddings"]) for share in DYNAMIC_LENGTHS]
        answer["lengths"] = np.array(lengths, np.int32)
        answer["by_length"] = np.stack([frequencies_at(config, length) for length in lengths])
    return answer


def frequencies_at(config: LlamaConfig, length: int) -> np.ndarray:
    """The inverse frequencies with which a fresh model computes the last token of a row of `length` tokens."""
    rotary = LlamaRotaryEmbedding(config)
    rotary(torch.zeros(1), torch.tensor([[length - 1]]))
    return rotary.inv_freq.numpy().copy()


def sampling_reference(settings: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """The chances, float64, that each of `settings` leaves to rows that are flat, usual and peaked."""
    rows = [seeded_tensor(f"logits {row}", (64,), std) for row, std in enumerate((0.3, 1.0, 2.0, 3.0, 6.0, 12.0))]
    logits = np.stack(rows).astype(np.float64)
    seen = np.stack([seeded_tokens(f"seen {row}", 12, 64) for row in range(len(rows))])
    answers = []
    for setting in settings:
        chain = LogitsProcessorList(make(setting[key]) for key, make in PROCESSORS.items() if key in setting)
        scores = chain(torch.from_numpy(seen), torch.from_numpy(logits.copy()))
        answers.append(torch.softmax(scores, dim=-1).numpy())
    return {"logits": logits, "seen": seen, "probabilities": np.stack(answers)}


def main() -> None:
    """Writes references/llama_<name>.npz for every config of llama.json, references/rope.npz and sampling.npz."""
    torch.set_num_threads(1)
    references = HERE / "references"
    ropes = {
        f"{name}.{part}": value
        for name, raw in json.loads((HERE / "rope.json").read_text()).items()
        for part, value in rope_reference(raw).items()
    }
    np.savez_compressed(references / "rope.npz", allow_pickle=False, **ropes)
    sampling = sampling_reference(json.loads((HERE / "sampling.json").read_text()))
    np.savez_compressed(references / "sampling.npz", allow_pickle=False, **sampling)
    for name, config in json.loads((HERE / "llama.json").read_text()).items():
        np.savez_compressed(references / f"llama_{name}.npz", allow_pickle=False, **llama_reference(name, config))


if __name__ == "__main__":
    main()
