"""Other ways to let a layer read earlier ones, behind the same interface: attention over depth, and rivals of LIMe.

Each class is one published method, about as long as its equation; letters are those of `depth.py`.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from lime_jax.depth import Depth, contract, softmax, unit, wide
from lime_jax.mixer import Mixer, Params, Shape


class DepthAttention(Mixer):
    """V~ = sum over j of softmax(q . K[j] / sqrt(k))[j] V[j], j up to the own layer; keys stay (arXiv 2606.05014).

    No parameters. Where several query heads share keys, their mean asks, so that the cache keeps its size.
    """

    per_layer = 1
    mixes_rows = True
    from_input = True

    @property
    def slot_shape(self) -> tuple[int, ...]:
        return (2, self.shape.num_kv_heads, self.shape.head_dim)

    def keys_values(self, params, normed, q, k, v, depth):
        groups, width = k.shape[-2:]
        depth = depth.append(jnp.stack([k, v], axis=-3))
        asks = jnp.mean(q.reshape(*q.shape[:-2], groups, -1, width), axis=-2) * width**-0.5
        dtype = jnp.promote_types(q.dtype, jnp.float32)

        def score(slots: Array) -> Array:
            return jnp.einsum("...gk,j...gk->j...g", asks, slots[..., 0, :, :], preferred_element_type=dtype)

        weights = softmax(depth.scores(score, self.slots))
        return k, depth.mix("j...g,j...sgk->...sgk", weights)[..., 1, :, :], depth


class AttentionResiduals(Mixer):
    """Input of sub-layer i = sum over s < i of softmax(w[i] . unit(y[s]))[s] y[s] (arXiv 2603.15031).

    y are the embeddings and the outputs of all sub-layers before; there is no residual stream. Parameters: `query`
    [l, sites, d] and, for the output of the model, `query` [d]; zeros, which is the plain mean.
    """

    first = 1

    def __init__(self, config: Any, shape: Shape) -> None:
        super().__init__(config, shape)
        self.per_layer = 1 if shape.parallel_block else 2

    @property
    def slot_shape(self) -> tuple[int, ...]:
        return (self.shape.d_model,)

    def init(self, key: Array, dtype: DTypeLike) -> dict[str, Params]:
        s = self.shape
        layers = {"query": jnp.zeros((s.num_layers, self.per_layer, s.d_model), dtype)}
        return {"layers": layers, "final": {"query": jnp.zeros((s.d_model,), dtype)}}

    def _read(self, query: Array, depth: Depth) -> Array:
        def score(slots: Array) -> Array:
            return jnp.einsum("d,j...d->j...", wide(query), unit(slots, self.shape.norm_eps))

        return depth.mix("j...,j...d->...d", softmax(depth.scores(score, self.slots)))

    def enter(self, params, carry, depth, site):
        return self._read(params["query"][site], depth), lambda y, later: (carry, later.append(y))

    def close(self, params, carry, bank):
        return self._read(params["query"], Depth(bank, self.slots, self.shape.num_layers))


class DenseFormer(Mixer):
    """After layer i: x = sum over j <= i of a[i, j] X[j] (arXiv 2402.02622).

    X[0] are the embeddings and X[j] layer j's output. Parameters: `weights` [l, j], which start as the identity.
    """

    first = 1
    per_layer = 1
    push = True

    @property
    def slot_shape(self) -> tuple[int, ...]:
        return (self.shape.d_model,)

    def init(self, key: Array, dtype: DTypeLike) -> dict[str, Params]:
        layers = self.shape.num_layers
        return {"layers": {"weights": jnp.eye(layers, layers + 1, 1, dtype)}}

    def effective(self, params: Params) -> Params:
        return {"weights": jnp.tril(params["weights"], 1)}

    def leave(self, params, carry, depth):
        depth = depth.append(carry)
        return depth.mix("j,j...d->...d", params["weights"]), depth

    def columns(self, params: Params) -> Array:
        return jnp.tril(params["weights"]).T  # the own output is added when the layer leaves

    def contribute(self, column: Array, slot: Array) -> Array:
        return contract("l,...d->l...d", column, slot)


class HyperConnections(Mixer):
    """Dynamic Hyper-Connections (arXiv 2409.19606): n residual streams H [n, ..., d].

    With a = tanh(unit(H) W_a) s_a + A and b = tanh(unit(H) w_b) s_b + B, a sub-layer reads sum over i of a[i, 0] H[i],
    and H[o] becomes sum over i of a[i, 1 + o] H[i], plus b[o] times its output. A starts as one stream to read, in
    turn, and the identity; B as ones; W as zeros; s as 0.01. The output of the model is the sum of the streams.
    """

    def init(self, key: Array, dtype: DTypeLike) -> dict[str, Params]:
        n, layers, d = self.config.streams, self.shape.num_layers, self.shape.d_model
        sites = 1 if self.shape.parallel_block else 2
        read = np.eye(n)[np.arange(layers * sites) % n].reshape(layers, sites, n, 1)
        keep = np.broadcast_to(np.eye(n), (layers, sites, n, n))
        params = {
            "static_alpha": jnp.asarray(np.concatenate([read, keep], axis=-1)),
            "static_beta": jnp.ones((layers, sites, n)),
            "alpha": jnp.zeros((layers, sites, d, n + 1)),
            "beta": jnp.zeros((layers, sites, d)),
            "alpha_scale": jnp.full((layers, sites), 0.01),
            "beta_scale": jnp.full((layers, sites), 0.01),
        }
        return {"layers": {name: value.astype(dtype) for name, value in params.items()}}

    def open(self, x: Array) -> Array:
        return jnp.broadcast_to(x, (self.config.streams, *x.shape))

    def close(self, params, carry, bank):
        return jnp.sum(carry, axis=0)

    def enter(self, params, carry, depth, site):
        p = {name: value[site].astype(carry.dtype) for name, value in params.items()}
        normed = unit(carry, self.shape.norm_eps)
        alpha = jnp.tanh(jnp.einsum("n...d,do->n...o", normed, p["alpha"])) * p["alpha_scale"]
        beta = jnp.tanh(jnp.einsum("n...d,d->n...", normed, p["beta"])) * p["beta_scale"]
        rows = [1] * (carry.ndim - 2)
        alpha += p["static_alpha"].reshape(len(carry), *rows, -1)
        beta += p["static_beta"].reshape(len(carry), *rows)
        mixed = jnp.einsum("n...o,n...d->o...d", alpha, carry)
        return mixed[0], lambda y, later: (mixed[1:] + beta[..., None] * y, later)


class ValueResidual(Mixer):
    """V~[l] = a[l] V[1] + b[l] V[l] for layers after the first (arXiv 2410.17897); a and b start at 1/2.

    Parameters: `weights` [l, 2]; the first layer's are not used.
    """

    per_layer = 1
    mixes_rows = True
    from_input = True
    push = True

    @property
    def slot_shape(self) -> tuple[int, ...]:
        return (self.shape.num_kv_heads, self.shape.head_dim)

    def init(self, key: Array, dtype: DTypeLike) -> dict[str, Params]:
        weights = jnp.full((self.shape.num_layers, 2), 0.5, dtype).at[0].set(0)
        return {"layers": {"weights": weights}}

    def effective(self, params: Params) -> Params:
        layers = np.arange(self.shape.num_layers)
        first, own = params["weights"][:, :1], params["weights"][:, 1:]
        table = jnp.where(layers == 0, first, 0) + jnp.where(layers == layers[:, None], own, 0)
        return {"weights": table.at[0].set(jnp.asarray(layers == 0, table.dtype))}

    def keys_values(self, params, normed, q, k, v, depth):
        depth = depth.append(v)
        return k, depth.mix("j,j...gk->...gk", params["weights"]), depth

    def columns(self, params: Params) -> Array:
        return jnp.tril(params["weights"], -1).T

    def contribute(self, column: Array, slot: Array) -> Array:
        return contract("l,...gk->l...gk", column, slot)
