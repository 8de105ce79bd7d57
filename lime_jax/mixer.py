"""What a layer asks of a mixer. The base class is the plain Transformer: it reads no other layer.

A mixer is a bundle of pure functions of arrays. It knows nothing of attention over time, and rows may be
anything: tokens in any arrangement, memory rows, a prompt. A layer calls, in this order,

    x, add = mixer.enter(params, carry, depth, site=0)            input of attention, and how to add its output
    q_in, k_in, v_in, depth = mixer.attention_inputs(params, x, norm, depth)
    k, v, depth = mixer.keys_values(params, q_in, q, k, v, depth) before the rotary rotation
    carry, depth = add(attention's output, depth)
    x, add = mixer.enter(params, carry, depth, site=1)
    ff_in, depth = mixer.ff_input(params, x, norm, depth)
    carry, depth = add(feed-forward's output, depth)
    carry, depth = mixer.leave(params, carry, depth)

and the model `mixer.open` on the embeddings before the first layer and `mixer.close` after the last. A parallel
block enters once, and adds the sum of both outputs. `depth.own` then holds what the layer writes to the bank.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from lime_jax.depth import Depth

Params = dict[str, Array]
Norm = Callable[[Array], Array]
Add = Callable[[Array, Depth], tuple[Array, Depth]]


class Shape(NamedTuple):
    """The sizes of a model that a mixer needs; `shape_of` reads them off a config."""

    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    parallel_block: bool = False
    norm_eps: float = 1e-6


def shape_of(config: Any) -> Shape:
    """The sizes from any config that has attributes of these names."""
    return Shape(*(getattr(config, name) for name in Shape._fields))


class Mixer:
    """No mixing.

    Attributes:
        config: The mixer's config.
        shape: Sizes of the model.
        first: Slots of the bank before those of the first layer; 1 if the embeddings have one.
        per_layer: Slots that each layer writes.
        mixes_rows: Memory rows take part. Mixers of the residual stream leave them alone.
        mixes_ff: The feed-forward has a mixture of its own.
        push: Weights do not depend on activations, so that sources can be pushed to later layers.
        from_input: Slots depend on the layer's input alone, so that they can be rebuilt from it.
    """

    first = 0
    per_layer = 0
    mixes_rows = False
    mixes_ff = False
    push = False
    from_input = False

    def __init__(self, config: Any, shape: Shape) -> None:
        self.config = config
        self.shape = shape

    @property
    def slots(self) -> int:
        """Slots of the bank."""
        return self.first + self.shape.num_layers * self.per_layer

    @property
    def backward(self) -> str:
        """How the gradient of a scanned stack keeps its memory linear; see `run_layers`."""
        return getattr(self.config, "backward", "push" if self.push else "write_once")

    @property
    def slot_shape(self) -> tuple[int, ...]:
        """Shape of a row's part of a slot."""
        raise NotImplementedError

    def bank(self, rows: tuple[int, ...], dtype: DTypeLike) -> Array:
        """An empty bank for rows of the given shape; for mixers whose layers write slots."""
        return jnp.zeros((self.slots, *rows, *self.slot_shape), dtype)

    def init(self, key: Array, dtype: DTypeLike) -> dict[str, Params]:
        """Parameters: `layers`, each with a leading layer axis, and `final`, which `close` reads; no empty ones."""
        return {}

    def effective(self, params: Params) -> Params:
        """`layers` parameters as layers use them: what no layer may read is zero, whatever the parameters hold."""
        return params

    def open(self, x: Array) -> Array:
        """Embeddings [..., d] to what goes from layer to layer."""
        return x

    def close(self, params: Params, carry: Array, bank: Array | None) -> Array:
        """The last layer's output [..., d]."""
        return carry

    def enter(self, params: Params, carry: Array, depth: Depth, site: int) -> tuple[Array, Add]:
        """Input of sub-layer `site` of a layer [..., d], and a function that adds its output to the carry."""
        return carry, lambda y, later: (carry + y, later)

    def attention_inputs(self, params: Params, x: Array, norm: Norm, depth: Depth) -> tuple[Array, Array, Array, Depth]:
        """What queries, keys and values are projected from: normed, [..., d], or [..., g, d] for keys and values."""
        normed = norm(x)
        return normed, normed, normed, depth

    def keys_values(
        self, params: Params, normed: Array, q: Array, k: Array, v: Array, depth: Depth
    ) -> tuple[Array, Array, Depth]:
        """Keys and values [..., g, k] that attention uses, from raw ones, before the rotary rotation.

        Args:
            params: The layer's.
            normed: What queries were projected from [..., d].
            q: Raw queries [..., h, k].
            k: Raw keys [..., g, k].
            v: Raw values [..., g, k].
            depth: Earlier layers.
        """
        return k, v, depth

    def ff_input(self, params: Params, x: Array, norm: Norm, depth: Depth) -> tuple[Array, Depth]:
        """What the feed-forward reads: normed [..., d]."""
        return norm(x), depth

    def leave(self, params: Params, carry: Array, depth: Depth) -> tuple[Array, Depth]:
        """After a layer."""
        return carry, depth

    def columns(self, params: Params) -> Any:
        """Push and pull form: weights of each source slot for all later layers, stacked over slots."""
        raise NotImplementedError

    def contribute(self, column: Any, slot: Array) -> Array:
        """Push form: what a source slot [..., slot] adds to every layer [l, ..., slot]."""
        raise NotImplementedError

    def pack(self, slot: Array) -> Array:
        """Pull form: a slot [..., slot] as the bank has it."""
        raise NotImplementedError

    def unpack(self, packed: Array) -> Array:
        """Pull form: the inverse of `pack`."""
        raise NotImplementedError

    def pull(self, weights: Any, bank: Array) -> Array:
        """Pull form: the mixture [..., slot] of packed slots [j, ...], by a layer's weights of them."""
        raise NotImplementedError

    def pull_back(self, weights: Any, bank: Array) -> Array:
        """Pull form: the packed gradient of a slot, by its column, from those of all layers' mixtures [l, ...]."""
        raise NotImplementedError

    def pull_weights(self, bank: Array, d_bank: Array) -> Array:
        """Pull form: the gradient of all columns, from all packed slots and the gradients of all mixtures."""
        raise NotImplementedError
