"""Which of their weights is which of ours, and how it is turned into the other's form.

What a family computes differently by a constant goes into its weights, and so needs nothing in the decoder: Gemma's
norms multiply by 1 + w; its embeddings are multiplied by sqrt(d) where they enter, which for tied ones is undone in the
final norm; queries may be scaled by another number than head_dim^-1/2.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from fam_jax.config import DecoderConfig
from fam_jax.pretrained.families import GEMMA, family_of, query_scale


class Weight(NamedTuple):
    """One of their weights.

    Attributes:
        name: Its name, with {} for the layer.
        ours: From their array to ours.
        theirs: Back.
    """

    name: str
    ours: Callable[[np.ndarray], np.ndarray]
    theirs: Callable[[np.ndarray], np.ndarray]


def weights(config: DecoderConfig, theirs: Mapping[str, Any]) -> dict[tuple[str, ...], Weight]:
    """Their weights by the path of ours; those of layers have "layers" first.

    Args:
        config: The decoder's.
        theirs: The `config.json`.
    """
    family, fields = family_of(theirs)
    d, h, g, k = config.d_model, config.num_heads, config.num_kv_heads, config.head_dim
    scale, gemma = query_scale(fields, k), family in GEMMA
    width = d**0.5 if gemma else 1.0

    def heads_out(name: str, heads: int, factor: float = 1.0) -> Weight:
        return Weight(
            name,
            lambda w: w.reshape(heads, k, d).transpose(2, 0, 1) * factor,
            lambda w: w.transpose(1, 2, 0).reshape(heads * k, d) / factor,
        )

    def transposed(name: str) -> Weight:
        return Weight(name, lambda w: w.T, lambda w: w.T)

    def bias(name: str, heads: int) -> Weight:
        return Weight(name, lambda b: b.reshape(heads, k), lambda b: b.reshape(heads * k))

    def norm(name: str, factor: float = 1.0) -> Weight:
        offset = 1.0 if gemma else 0.0
        return Weight(name, lambda w: (w + offset) * factor, lambda w: w / factor - offset)

    attention, mlp = "model.layers.{}.self_attn.", "model.layers.{}.mlp."
    found = {
        "attn_norm": norm("model.layers.{}.input_layernorm.weight"),
        "wq": heads_out(f"{attention}q_proj.weight", h, 1.0 if config.qk_norm else scale),
        "wk": heads_out(f"{attention}k_proj.weight", g),
        "wv": heads_out(f"{attention}v_proj.weight", g),
        "wo": Weight(f"{attention}o_proj.weight", lambda w: w.T.reshape(h, k, d), lambda w: w.reshape(h * k, d).T),
        "w_gate": transposed(f"{mlp}gate_proj.weight"),
        "w_up": transposed(f"{mlp}up_proj.weight"),
        "w_down": transposed(f"{mlp}down_proj.weight"),
    }
    if config.attention_bias:
        found |= {f"b{part}": bias(f"{attention}{part}_proj.bias", h if part == "q" else g) for part in "qkv"}
    if config.qk_norm:
        found |= {"q_norm": norm(f"{attention}q_norm.weight", scale), "k_norm": norm(f"{attention}k_norm.weight")}
    after_attention = "model.layers.{}.post_attention_layernorm.weight"
    if config.post_norms:
        found |= {
            "attn_post_norm": norm(after_attention),
            "ff_norm": norm("model.layers.{}.pre_feedforward_layernorm.weight"),
            "ff_post_norm": norm("model.layers.{}.post_feedforward_layernorm.weight"),
        }
    else:
        found["ff_norm"] = norm(after_attention)
    table: dict[tuple[str, ...], Weight] = {("layers", name): weight for name, weight in found.items()}
    table["embed",] = Weight("model.embed_tokens.weight", lambda w: w * width, lambda w: w / width)
    table["final_norm",] = norm("model.norm.weight", 1 / width if config.tie_embeddings else 1.0)
    if not config.tie_embeddings:
        table["unembed",] = transposed("lm_head.weight")
    return table
