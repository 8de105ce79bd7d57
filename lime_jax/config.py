"""Configs of everything that can mix layers: LIMe's routers, attention over depth, and the rivals.

Configs are frozen and hashable, so they can be static arguments of `jax.jit`. A wrong value is a `ValueError`
that names the field, the value and what is allowed.
"""

import dataclasses
import re
from typing import Any

import numpy as np

# Routers whose weights belong to the layer, and those that compute them from each token.
STATIC = ("static_kv", "static_hidden", "average")
DYNAMIC = ("dynamic_kv", "dynamic_hidden", "dynamic_views")
OF_HEADS = ("static_kv", "dynamic_kv", "average")  # these mix keys and values, the others layer states


def _check_choice(owner: str, field: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{owner}.{field}={value!r} is not known; allowed: {', '.join(map(repr, allowed))}")


@dataclasses.dataclass(frozen=True)
class LimeConfig:
    """Layer-Integrated Memory (arXiv 2502.09245): a learned mixture of earlier layers feeds a layer's attention.

    Attributes:
        router: What is mixed, and how the weights come about.
            "static_kv": keys and values of all earlier layers and heads, by signed weights (the paper's second
            version). "average": their fixed mean over layers, head by head. "dynamic_kv": static_kv plus, per head
            and source layer, a scalar computed from the token (ours; starts at static_kv).
            "static_hidden" and "dynamic_hidden": normalised layer states, by a softmax over layers for each head,
            learned or computed from the token (first version). "dynamic_views": the inputs of all sub-layers, by a
            softmax computed from the token, apart for queries, keys, values and the feed-forward
            (x-transformers' DynamicLIMe).
        sources: Layers that are read: "all" up to the own one; "first:k", layers 1 to k, the previous and the own;
            "last:k", the k latest, the own included, so "last:1" is no mixing.
        same_head: A head reads only the head of its number in other layers. For static_kv and dynamic_kv.
        separate_kv: Keys and values have a router each. For static_kv and dynamic_kv.
        init: Of the weights of other layers in static_kv and dynamic_kv, the own layer's being the identity:
            "random" as in the paper, or "zeros", which starts exactly at the model without mixing. "all_random" draws
            the own layer's, too, which the paper found worse.
        activation: Of dynamic_views: "softmax" or "relu".
        backward: How gradients are had under a scan over layers without memory quadratic in depth. "write_once"
            keeps each layer's input and every layer's sources once, and recomputes the layer. "rebuild" keeps only
            the inputs, and recomputes the sources too. "push" adds each source to all later layers as it appears,
            and "pull" keeps them in a bank, of which each layer's mixture is one product; both recompute only if the
            model asks for it, and are for static_kv and average.
    """

    router: str = "static_kv"
    sources: str = "all"
    same_head: bool = False
    separate_kv: bool = False
    init: str = "random"
    activation: str = "softmax"
    backward: str = "write_once"

    def __post_init__(self) -> None:
        name = "LimeConfig"
        _check_choice(name, "router", self.router, STATIC + DYNAMIC)
        if not re.fullmatch(r"all|(first|last):[1-9][0-9]*", self.sources):
            raise ValueError(
                f"LimeConfig.sources={self.sources!r} is not known; give 'all', 'first:k' or 'last:k', k at least 1"
            )
        _check_choice(name, "init", self.init, ("random", "zeros", "all_random"))
        _check_choice(name, "activation", self.activation, ("softmax", "relu"))
        _check_choice(name, "backward", self.backward, ("write_once", "rebuild", "push", "pull"))
        for field, default, routers in (
            ("same_head", False, ("static_kv", "dynamic_kv")),
            ("separate_kv", False, ("static_kv", "dynamic_kv")),
            ("init", "random", ("static_kv", "dynamic_kv")),
            ("activation", "softmax", ("dynamic_views",)),
        ):
            value = getattr(self, field)
            if isinstance(default, bool) and not isinstance(value, bool):
                raise ValueError(f"LimeConfig.{field}={value!r} is not allowed; it must be True or False")
            if value != default and self.router not in routers:
                raise ValueError(
                    f"LimeConfig.{field}={value!r} has no meaning for router={self.router!r}; it is for "
                    f"{' and '.join(routers)}"
                )
        if self.backward in ("push", "pull") and self.router not in ("static_kv", "average"):
            raise ValueError(
                f"LimeConfig.backward={self.backward!r} is not possible with router={self.router!r}: it needs weights "
                "that do not depend on the reading layer's activations; use 'write_once'"
            )


@dataclasses.dataclass(frozen=True)
class DenseFormerConfig:
    """DenseFormer (arXiv 2402.02622): after each layer, a learned mean over the outputs of all layers so far."""


@dataclasses.dataclass(frozen=True)
class HyperConnectionsConfig:
    """Dynamic Hyper-Connections (arXiv 2409.19606): several residual streams, read and written by learned weights.

    Attributes:
        streams: Residual streams.
    """

    streams: int = 4

    def __post_init__(self) -> None:
        if isinstance(self.streams, bool) or not isinstance(self.streams, int) or self.streams < 1:
            raise ValueError(f"HyperConnectionsConfig.streams={self.streams!r} is not allowed; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class ValueResidualConfig:
    """Value Residual (arXiv 2410.17897): each layer's values plus those of the first layer, by learned weights."""


@dataclasses.dataclass(frozen=True)
class DepthAttentionConfig:
    """Depth-Attention (arXiv 2606.05014): the query attends to earlier layers' keys of its token, mixing values."""


@dataclasses.dataclass(frozen=True)
class AttentionResidualsConfig:
    """Attention Residuals (arXiv 2603.15031): a sub-layer's input is attention over all outputs before it."""


MixingConfig = (
    LimeConfig
    | DenseFormerConfig
    | HyperConnectionsConfig
    | ValueResidualConfig
    | DepthAttentionConfig
    | AttentionResidualsConfig
)


def source_mask(sources: str, layers: int) -> np.ndarray:
    """Which layers each layer reads: bool [layer, source layer]; its own always, later ones never."""
    layer, source = np.arange(layers)[:, None], np.arange(layers)[None]
    earlier = source <= layer
    if sources == "all":
        return earlier
    which, count = sources.split(":")
    if which == "last":
        return earlier & (source > layer - int(count))
    return earlier & ((source < int(count)) | (source >= layer - 1))


def num_router_weights(config: Any) -> int:
    """Live weights of all routers of static_kv or dynamic_kv's static part: 138,240 for 16 layers of 32 heads.

    The first layer has none, because it has nothing to mix; what its own layer's weights hold counts for others.

    Args:
        config: Has `mixing`, a LimeConfig, `num_layers` and `num_kv_heads`, as a decoder's config has.

    Raises:
        ValueError: `mixing` is something else.
    """
    mixing = config.mixing
    if not isinstance(mixing, LimeConfig) or mixing.router not in ("static_kv", "dynamic_kv"):
        raise ValueError(f"mixing={mixing!r} has no router over heads; give a LimeConfig with router='static_kv'")
    pairs = int(source_mask(mixing.sources, config.num_layers)[1:].sum())
    heads = config.num_kv_heads if mixing.same_head else config.num_kv_heads**2
    return pairs * heads * (2 if mixing.separate_kv else 1)
