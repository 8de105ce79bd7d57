"""What a layer reads of the layers before it: a bank of slots, and mixtures over them.

Letters in einsum strings and shapes: j slot of the bank (a source layer, or a sub-layer where a layer writes two),
l layer, g key/value head, h head that reads, s keys or values (0, 1), k head width, d model width; "..." are the
rows, of any shape: tokens, or anything else that climbs through the layers.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array


@dataclasses.dataclass(frozen=True)
class Depth:
    """The earlier layers as one layer sees them, row by row.

    Attributes:
        bank: Slots that layers write: [j, ..., slot]. Only the first `live` are read, so it does not matter what
            the others hold: under a scan over layers, every layer is given the whole bank.
        live: Slots that earlier layers have written.
        layer: Number of the layer, from 0.
        own: Slots that this layer has written so far, each [..., slot].
        pushed: In the push and the pull form, the finished mixture of all earlier slots, in place of a bank.
    """

    bank: Array | None
    live: Array | int
    layer: Array | int
    own: tuple[Array, ...] = ()
    pushed: Array | None = None

    def append(self, slot: Array) -> "Depth":
        """With one more slot [..., slot] of this layer's own."""
        return dataclasses.replace(self, own=(*self.own, slot))

    def readable(self, slots: int) -> Array:
        """Which of `slots` slots this layer may read now: bool [j]."""
        return jnp.arange(slots) < self.live + len(self.own)

    def scores(self, score: Callable[[Array], Array], slots: int) -> Array:
        """Scores of slots in float32 at least, -inf where there is nothing to read.

        Args:
            score: Maps slots [j, ..., slot] to scores [j, ...].
            slots: Slots in all, j.
        """
        earlier = [] if self.bank is None else [score(self.bank)]
        parts = jnp.concatenate([*earlier, score(jnp.stack(self.own))] if self.own else earlier)
        # Own slots stand behind the bank; each is moved to its number.
        count = 0 if self.bank is None else len(self.bank)
        number = jnp.arange(slots)
        place = jnp.where(number < self.live, number, number - self.live + count)
        readable = self.readable(slots).reshape(-1, *[1] * (parts.ndim - 1))
        parts = jnp.take(parts, jnp.clip(place, 0, len(parts) - 1), axis=0)
        return jnp.where(readable, wide(parts), -jnp.inf)

    @jax.named_scope("mix")
    def mix(self, equation: str, weights: Array) -> Array:
        """Weighted sum over the readable slots, accumulated in float32 at least.

        Args:
            equation: Einsum of weights [j, ...] with slots [j, ..., slot], which sums over j.
            weights: Weights [j, ...] of all slots; those of unreadable ones are not used.
        """
        total = None if self.pushed is None else self.pushed
        if total is None and self.bank is not None and len(self.bank):
            used = weights[: len(self.bank)]
            live = (jnp.arange(len(used)) < self.live).reshape(-1, *[1] * (used.ndim - 1))
            total = contract(equation, jnp.where(live, used, 0), self.bank)
        for number, slot in enumerate(self.own):
            part = contract(equation, own_weights(weights, self.live + number)[None], slot[None])
            total = part if total is None else total + part
        slots = self.own[0] if self.own else self.bank
        assert total is not None, "there is nothing to mix"
        assert slots is not None
        return total.astype(slots.dtype)


def wide(array: Array) -> Array:
    """In float32 at least."""
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


NO_DEPTH = Depth(None, 0, 0)


def own_weights(weights: Array, number: Array | int) -> Array:
    """`weights[number]`, number traced or not."""
    return jax.lax.dynamic_index_in_dim(weights, number, keepdims=False)


@jax.named_scope("mix")
def contract(equation: str, weights: Array, slots: Array) -> Array:
    """Einsum of weights [j, ...] and slots [j, ..., slot] that accumulates in float32 at least."""
    return jnp.einsum(equation, weights, slots, preferred_element_type=jnp.promote_types(slots.dtype, jnp.float32))


def softmax(scores: Array) -> Array:
    """Softmax over slots, the first axis; -inf scores get weight zero."""
    return jax.nn.softmax(scores, axis=0)


def unit(x: Array, eps: float) -> Array:
    """X [..., d] over its root mean square, without a learned scale."""
    y = wide(x)
    return (y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)).astype(x.dtype)
