"""An independent forward pass of a Llama, straight from its folder: numpy in float64, after the published architecture.

Touvron et al. 2023 (RMSNorm, SwiGLU), 2023b (groups of heads share keys and values), Su et al. 2021 (rotary embeddings,
in the layout of Hugging Face: the numbers of a pair are half a head apart). Nothing of softlabel or torch in here.

L positions, V tokens of the vocabulary, D width of the model, H heads, G heads of keys and values, E width of a head, K
kept tokens.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

F64 = NDArray[np.float64]

_BITS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True, kw_only=True)
class Llama:
    """The content of config.json, and the weights by their names without `model.`."""

    config: dict[str, Any]
    weights: dict[str, F64]


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """Rows of logits at a temperature T: the log-sum-exp (L,) of logits / T; the K tokens with the largest ones (L, K),
    equal ones by id, with their logits / T less the largest; and the log-sum-exp (L,) of this over all other tokens."""

    log_sum_exp: F64
    index: NDArray[np.int64]
    value: F64
    tail: F64


def read_weights(path: Path) -> dict[str, F64]:
    """The arrays of a safetensors file as float64."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    found = {}
    for name, one in json.loads(raw[8:start]).items():
        if name != "__metadata__":
            first, end = one["data_offsets"]
            bits = np.frombuffer(raw[start + first : start + end], _BITS[one["dtype"]])
            if one["dtype"] == "BF16":  # the upper half of a float32
                bits = (bits.astype("<u4") << 16).view("<f4")
            found[name] = bits.reshape(one["shape"]).astype(np.float64)
    return found


def read_llama(folder: Path) -> Llama:
    config = json.loads((folder / "config.json").read_text())
    weights = {name.removeprefix("model."): one for name, one in read_weights(folder / "model.safetensors").items()}
    usual = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    assert {name: config[name] for name in usual} == usual, "not written here"
    assert config["rope_parameters"]["rope_type"] == "default", "not written here"
    return Llama(config=config, weights=weights)


def compute_logits(model: Llama, ids: Sequence[int]) -> F64:
    """Logits (L, V) of one document; row t is about what comes after ids[: t + 1]."""
    config, weights = model.config, model.weights
    heads = config["num_attention_heads"]
    groups, width = config["num_key_value_heads"], config["head_dim"]
    theta = config["rope_parameters"]["rope_theta"]
    angles_LE = np.outer(np.arange(len(ids)), theta ** (-np.arange(0, width, 2) / width))
    cos_LE, sin_LE = np.cos(angles_LE), np.sin(angles_LE)

    def normalise(x_LD: F64, name: str) -> F64:
        return x_LD / np.sqrt((x_LD**2).mean(axis=1, keepdims=True) + config["rms_norm_eps"]) * weights[name]

    def rotate(x_HLE: F64) -> F64:
        one, other = np.split(x_HLE, 2, axis=2)
        return np.concatenate([one * cos_LE - other * sin_LE, other * cos_LE + one * sin_LE], axis=2)

    def split(x_LD: F64, name: str, count: int) -> F64:
        return (x_LD @ weights[name].T).reshape(len(ids), count, width).transpose(1, 0, 2)

    later_LL = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
    x_LD = weights["embed_tokens.weight"][np.asarray(ids)]
    for number in range(config["num_hidden_layers"]):
        layer = f"layers.{number}"
        y_LD = normalise(x_LD, f"{layer}.input_layernorm.weight")
        q_HLE = rotate(split(y_LD, f"{layer}.self_attn.q_proj.weight", heads))
        k_HLE = np.repeat(rotate(split(y_LD, f"{layer}.self_attn.k_proj.weight", groups)), heads // groups, axis=0)
        v_HLE = np.repeat(split(y_LD, f"{layer}.self_attn.v_proj.weight", groups), heads // groups, axis=0)
        score_HLL = q_HLE @ k_HLE.transpose(0, 2, 1) / np.sqrt(width) + later_LL
        score_HLL = np.exp(score_HLL - score_HLL.max(axis=2, keepdims=True))
        seen_HLE = score_HLL / score_HLL.sum(axis=2, keepdims=True) @ v_HLE
        joined_LD = seen_HLE.transpose(1, 0, 2).reshape(len(ids), heads * width)
        x_LD = x_LD + joined_LD @ weights[f"{layer}.self_attn.o_proj.weight"].T
        y_LD = normalise(x_LD, f"{layer}.post_attention_layernorm.weight")
        gate_LF = y_LD @ weights[f"{layer}.mlp.gate_proj.weight"].T
        up_LF = y_LD @ weights[f"{layer}.mlp.up_proj.weight"].T
        x_LD = x_LD + (gate_LF / (1 + np.exp(-gate_LF)) * up_LF) @ weights[f"{layer}.mlp.down_proj.weight"].T
    last = "embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    logits_LV: F64 = normalise(x_LD, "norm.weight") @ weights[last].T
    return logits_LV


def _log_sum_exp(x_LV: F64) -> F64:
    most_L = x_LV.max(axis=1, initial=-1e300)
    with np.errstate(divide="ignore"):
        found_L: F64 = most_L + np.log(np.exp(x_LV - most_L[:, None]).sum(axis=1))
    return found_L


def describe(logits_LV: F64, *, k: int, temperature: float = 1.0) -> Distribution:
    scaled_LV = logits_LV / temperature
    scaled_LV = scaled_LV - scaled_LV.max(axis=1, keepdims=True)
    order_LV = np.argsort(-logits_LV, axis=1, kind="stable")
    return Distribution(
        log_sum_exp=_log_sum_exp(logits_LV / temperature),
        index=order_LV[:, :k],
        value=np.take_along_axis(scaled_LV, order_LV[:, :k], axis=1),
        tail=_log_sum_exp(np.take_along_axis(scaled_LV, order_LV[:, k:], axis=1)),
    )


def measure_nll(logits_LV: F64, ids: Sequence[int], shift: int = 1) -> float:
    """Mean negative log-likelihood in nats of the token `shift` places behind each position: 1 is the next one."""
    after = np.asarray(ids)[shift:]
    rows = np.arange(len(after))
    return float((_log_sum_exp(logits_LV[rows]) - logits_LV[rows, after]).mean())


def write_unpermuted(folder: Path, out: Path) -> Path:
    """A copy of a model whose q and k rows are in the order of the original release, pairs side by side: the mistake of
    a conversion without the permutation. It loads without an error, and its answers are much worse."""
    out.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.json"):
        shutil.copyfile(path, out / path.name)
    config, weights = json.loads((folder / "config.json").read_text()), read_weights(folder / "model.safetensors")
    for name, weight in weights.items():
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        if heads is not None:
            halves = weight.reshape(config[heads], 2, -1, weight.shape[1])
            weights[name] = halves.transpose(0, 2, 1, 3).reshape(weight.shape)
    saved = {name: np.ascontiguousarray(weight, np.float32) for name, weight in weights.items()}
    save_file(saved, out / "model.safetensors", metadata={"format": "pt"})
    return out
