"""What `experiments.speed` compares: models by a short name, and the programs that are timed.

An arm is written MEMORY[+lime][/SCHEDULE][@ATTENTION][:REMAT]: `fam`, `bswa` or `full`; LIMe (static_kv) on top, with
its other ways to gradients `lime-push`, `lime-pull` and `lime-rebuild`, or as `lime-views` (dynamic_views); the
schedule, `layer`, `block` or `wavefront`; attention, `auto`, `xla`, `cudnn` or `splash`; the decoder's remat. What is
left out is as in the shape that all arms share. Those of `experiments.peers` are another library's models.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments import peers
from fam_jax import Decoder, DecoderConfig, MemoryConfig, presets
from fam_jax.state import init_state
from lime_jax import LimeConfig

TEXT_MODES = ("forward", "train", "prefill")
STREAM = "stream"  # whose step reads a text in parts
TOKEN_MODES = ("decode", "decode-end")  # whose step reads one token of each text
MODES = (*TEXT_MODES, STREAM, *TOKEN_MODES)
_ARM = re.compile(
    r"(fam|bswa|full)(?:\+lime(-push|-pull|-rebuild|-views|))?(?:/(layer|block|wavefront))?(?:@(auto|xla|cudnn|splash))?(?::(none|dots|attention|full))?"
)

_LIME = {
    "": LimeConfig(),
    "-push": LimeConfig(backward="push"),
    "-pull": LimeConfig(backward="pull"),
    "-rebuild": LimeConfig(backward="rebuild"),
    "-views": LimeConfig("dynamic_views"),
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """What all arms share: a preset, and what replaces parts of it.

    Attributes:
        preset: Of `fam_jax.presets`. None of what follows is changed where it is 0 or None.
        layers: Layers.
        width: Width; the feed-forward is as many times as wide as in the preset.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Width of a head.
        vocab: Tokens of the vocabulary.
        block: Tokens of a block.
        segments: Memory segments.
        fam: FAM rows of a block.
        dtype: Type of the activations.
        unroll: Layers one after another in the program, in place of a scan.
    """

    preset: str = "palm_1b"
    layers: int = 0
    width: int = 0
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    vocab: int = 0
    block: int = 0
    segments: int | None = None
    fam: int = 0
    dtype: str | None = None
    unroll: bool = False


def model_config(shape: Shape, arm: str) -> DecoderConfig:
    """The decoder of an arm.

    Raises:
        ValueError: The arm or the preset is not known, or the decoder is none.
    """
    found = _ARM.fullmatch(peers.our_arm(arm) if peers.is_peer(arm) else arm)
    if found is None:
        raise ValueError(
            f"arms has {arm!r}, which is no MEMORY[+lime][/SCHEDULE][@ATTENTION][:REMAT], as 'fam', 'fam+lime', "
            "'bswa/block' and 'full@cudnn:full' are, nor one of experiments.peers"
        )
    if not hasattr(presets, shape.preset) or shape.preset.startswith("_"):
        raise ValueError(f"preset={shape.preset!r} is not known; there are those of fam_jax.presets, as 'palm_1b'")
    base = getattr(presets, shape.preset)()
    memory, lime, schedule, attention, remat = found.groups()
    given = base.memory or MemoryConfig(1024)
    changes = {
        "num_layers": shape.layers,
        "d_model": shape.width,
        "d_ff": shape.width * base.d_ff // base.d_model,
        "num_heads": shape.heads,
        "num_kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "dtype": shape.dtype,
        "schedule": schedule,
        "attention": attention,
        "remat": remat,
        "mixing": None if lime is None else _LIME[lime],
    }
    blocks = MemoryConfig(
        shape.block or given.block_size,
        given.segments if shape.segments is None else shape.segments,
        (shape.fam or given.fam_length) if memory == "fam" else 0,
    )
    return dataclasses.replace(
        base,
        memory=None if memory == "full" else blocks,
        scan_layers=base.scan_layers and not shape.unroll,
        **{name: value for name, value in changes.items() if value},
    )


def functions(
    mode: str, config: DecoderConfig, batch: int, length: int
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`make`, a key -> what the first step is given, and `step`, that and tokens -> the same and more. Not compiled.

    Args:
        mode: Of MODES; the step of a stream reads one part.
        config: The decoder's.
        batch: Texts.
        length: Tokens of a text.
    """
    model, optimizer = Decoder(config), optax.adamw(1e-4)

    def init(key: jax.Array) -> Any:
        return model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]

    def apply(params: Any, tokens: jax.Array, **more: Any) -> Any:
        return model.apply({"params": params}, tokens, **more)

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        return jnp.mean(apply(params, tokens, targets=jnp.roll(tokens, -1, axis=1)).losses.nll)

    def train(carry: Any, tokens: jax.Array) -> Any:
        params, state = carry
        value, gradients = jax.value_and_grad(loss)(params, tokens)
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), value

    def make(key: jax.Array) -> Any:
        params = init(key)
        return (params, optimizer.init(params))

    if mode not in TEXT_MODES:
        return _from_state(mode, config, batch, length)
    if mode == "train":
        return make, train
    if mode == "forward":
        return init, lambda params, tokens: (params, loss(params, tokens))
    return init, lambda params, tokens: (params, apply(params, tokens).state)


def _from_state(
    mode: str, config: DecoderConfig, batch: int, length: int
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`functions` that go on from a state: a part of a stream, or one token.

    The token is one in the middle of a block or at its end, and with full attention the last of a text. What was read
    before makes no difference to the time.
    """
    model, full = Decoder(config), config.memory is None
    size = length if config.memory is None else config.memory.block_size
    counters = {}
    if mode in TOKEN_MODES:
        rows, offset = jnp.ones((batch,), jnp.int32), size // 2 if mode == "decode" and not full else size - 1
        counters = {"fresh": rows == 0, "offset": rows * offset, "blocks": rows * ((length - 1) // size)}

    def make(key: jax.Array) -> Any:
        params = model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
        return params, dataclasses.replace(init_state(config, batch, length if full else None), **counters)

    def step(carry: Any, tokens: jax.Array) -> Any:
        params, state = carry
        tokens = tokens[:, :1] if counters else tokens
        out: Any = model.apply({"params": params}, tokens, state, aligned=not counters and not full)
        return (params, dataclasses.replace(out.state, **counters)), out.logits if counters else ()

    return make, step
