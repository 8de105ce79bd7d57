"""LIMe's routers. Each class is one router, about as long as its equation; letters are those of `depth.py`."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from lime_jax.config import LimeConfig, source_mask
from lime_jax.depth import Depth, contract, softmax, unit, wide
from lime_jax.mixer import Mixer, Norm, Params, Shape


def uniform(key: Array, shape: tuple[int, ...], bound: Array | np.ndarray, dtype: DTypeLike) -> Array:
    """Uniform between -bound and bound, which broadcasts against `shape`."""
    return (jax.random.uniform(key, shape, jnp.float32, -1.0, 1.0) * bound).astype(dtype)


class _Router(Mixer):
    """Mixes what layers write from their input alone, a slot each; `mask` [l, j] says which layer reads which."""

    per_layer = 1
    mixes_rows = True
    from_input = True

    def __init__(self, config: LimeConfig, shape: Shape) -> None:
        super().__init__(config, shape)
        self.mask = source_mask(config.sources, shape.num_layers)


class _KeyValueRouter(_Router):
    """Mixes raw keys and values; a slot is a layer's pair of them, [..., 2, g, k]."""

    @property
    def slot_shape(self) -> tuple[int, ...]:
        return (2, self.shape.num_kv_heads, self.shape.head_dim)

    def keys_values(self, params, normed, q, k, v, depth):
        depth = depth.append(jnp.stack([k, v], axis=-3))
        mixed = self.mixture(params, normed, depth)
        return mixed[..., 0, :, :], mixed[..., 1, :, :], depth

    def mixture(self, params: Params, normed: Array, depth: Depth) -> Array:
        """The mixed pair [..., 2, h, k]."""
        raise NotImplementedError


class StaticKV(_KeyValueRouter):
    """LIMe, second version (equations 1 and 2): K~[h] = sum over j, g of R[j, g, h] K[j, g], V~ alike.

    Parameters: `router` [l, h, j, g], with a leading axis of 2 after l if keys and values have one each, without
    g if heads stay apart. The first layer has no router.
    """

    push = True

    def __init__(self, config: LimeConfig, shape: Shape) -> None:
        super().__init__(config, shape)
        self.pair = "s" if config.separate_kv else ""
        if config.same_head:
            self.equation = f"j{self.pair}h,j...shk->...shk"
        else:
            self.equation = f"j{self.pair}hg,j...sgk->...shk"

    def _spread(self, table: np.ndarray) -> np.ndarray:
        """A table [l, j] with the axes of the router, to broadcast against it."""
        heads = 1 + self.config.separate_kv
        return np.expand_dims(table, (*range(1, heads + 1), *(() if self.config.same_head else (-1,))))

    def _identity(self) -> np.ndarray:
        """Every layer's own keys and values, unchanged, in the router's shape."""
        heads = self.shape.num_kv_heads
        own = self._spread(np.eye(self.shape.num_layers))
        own = own * (np.ones((heads, 1)) if self.config.same_head else np.eye(heads)[:, None, :])
        return np.repeat(own, 2, axis=1) if self.config.separate_kv else own

    def _live(self) -> np.ndarray:
        """Which weights exist; the first layer, which is the identity, has none."""
        live = self.mask.copy()
        live[0] = False
        return self._spread(live)

    def init(self, key: Array, dtype: DTypeLike) -> dict[str, Params]:
        identity = self._identity()
        fan_in = self.mask.sum(1, keepdims=True) * (1 if self.config.same_head else self.shape.num_kv_heads)
        bound = self._spread(np.sqrt(3 / fan_in))
        drawn = 0.0 if self.config.init == "zeros" else uniform(key, identity.shape, bound, jnp.float32)
        own = self._spread(np.eye(self.shape.num_layers, dtype=bool))
        router = drawn if self.config.init == "all_random" else jnp.where(own, identity, drawn)
        return {"layers": {"router": jnp.where(self._live(), router, 0).astype(dtype)}}

    def effective(self, params: Params) -> Params:
        router = jnp.asarray(params["router"])
        first = self._spread(np.arange(self.shape.num_layers)[:, None] == 0) * self._identity()
        router = jnp.where(self._live(), router, first.astype(router.dtype))
        # Slots come first, as in the bank.
        return params | {"router": jnp.moveaxis(router, -1 if self.config.same_head else -2, 1)}

    def mixture(self, params, normed, depth):
        return depth.mix(self.equation, params["router"])

    def columns(self, params: Params) -> Array:
        router = jnp.moveaxis(params["router"], 1, 0)  # [j, l, ...]
        layers = np.arange(self.shape.num_layers)
        later = (layers[None] > layers[:, None]).reshape(*2 * [len(layers)], *[1] * (router.ndim - 2))
        return jnp.where(later, router, 0)

    def contribute(self, column: Array, slot: Array) -> Array:
        into, out = self.equation.split("->")
        return contract(into.replace("j", "l", 1).replace("j", "") + "->l" + out, column, slot)

    # Pull form. Slots have their heads in front of the rows, so that nothing is moved for the products with the bank:
    # "jhg,jg...sk->h...sk", and so on.

    @property
    def _letters(self) -> tuple[str, str]:
        """Letters of a source's weights, without j, and of a slot's heads."""
        weights, slot = self.equation.split("->")[0].split(",")
        return weights.removeprefix("j"), slot[-2]

    def pack(self, slot: Array) -> Array:
        return jnp.moveaxis(slot, -2, 0)

    def unpack(self, packed: Array) -> Array:
        return jnp.moveaxis(packed, 0, -2)

    def pull(self, weights: Array, bank: Array) -> Array:
        letters, heads = self._letters
        return self.unpack(contract(f"j{letters},j{heads}...sk->h...sk", weights, bank))

    def pull_back(self, weights: Array, bank: Array) -> Array:
        letters, heads = self._letters
        return contract(f"l{letters},lh...sk->{heads}...sk", weights, bank).astype(bank.dtype)

    def pull_weights(self, bank: Array, d_bank: Array) -> Array:
        letters, heads = self._letters
        rows = "abcdef"[: bank.ndim - 4]
        return contract(f"j{heads}{rows}sk,lh{rows}sk->jl{letters}", bank, d_bank)


class Average(StaticKV):
    """The fixed mean over layers, head by head (the paper's table 7); no parameters."""

    def __init__(self, config: LimeConfig, shape: Shape) -> None:
        super().__init__(config, shape)
        self.equation = "j,j...shk->...shk"

    def init(self, key: Array, dtype: DTypeLike) -> dict[str, Params]:
        return {}

    def effective(self, params: Params) -> Params:
        return {"router": jnp.asarray(self.mask / self.mask.sum(1, keepdims=True))}


class DynamicKV(StaticKV):
    """Ours: static_kv, plus for every head and source layer a scalar computed from the token.

    K~[h] += sum over j of (x W)[h, j] K[j, h], V~ alike; W starts at zero, so the start is static_kv.
    Parameters: also `token` [l, d, h, j].
    """

    push = False

    def init(self, key: Array, dtype: DTypeLike) -> dict[str, Params]:
        params = super().init(key, dtype)
        s = self.shape
        params["layers"]["token"] = jnp.zeros((s.num_layers, s.d_model, s.num_kv_heads, s.num_layers), dtype)
        return params

    def effective(self, params: Params) -> Params:
        mask = self.mask.copy()
        mask[0] = False
        return super().effective(params) | {"token": jnp.where(mask[:, None, None], params["token"], 0)}

    def mixture(self, params, normed, depth):
        weights = jnp.einsum("...d,dhj->j...h", normed, params["token"].astype(normed.dtype))
        static = depth.mix(self.equation, params["router"])
        return static + depth.mix("j...h,j...shk->...shk", weights)


class _HiddenRouter(_Router):
    """Mixes normed layer states into the input of keys and values, for each head (first version of the paper).

    A slot is a layer's input over its root mean square [..., d]; the scale `norm` [l, d] of the reading layer is
    applied to the mixture, which is the same because it is linear.
    """

    @property
    def slot_shape(self) -> tuple[int, ...]:
        return (self.shape.d_model,)

    def effective(self, params: Params) -> Params:
        return params | {"allowed": jnp.asarray(self.mask)}

    def _weights(self, scores: Array, params: Params, depth: Depth) -> Array:
        """Softmax over the slots that may be read, of scores [j, ...]."""
        allowed = params["allowed"] & depth.readable(self.slots)
        return softmax(jnp.where(allowed.reshape(-1, *[1] * (scores.ndim - 1)), scores, -jnp.inf))


class StaticHidden(_HiddenRouter):
    """Z[h] = sum over j of softmax(w[h])[j] norm(S[j]); keys and values of head h are projected from Z[h].

    Parameters: `logits` [l, h, j] and `norm` [l, d].
    """

    def init(self, key: Array, dtype: DTypeLike) -> dict[str, Params]:
        s = self.shape
        logits = 0.1 * jax.random.normal(key, (s.num_layers, s.num_kv_heads, s.num_layers))
        logits = jnp.where(self.mask[:, None], logits, 0).astype(dtype)
        return {"layers": {"logits": logits, "norm": jnp.ones((s.num_layers, s.d_model), dtype)}}

    def attention_inputs(self, params, x, norm, depth):
        depth = depth.append(unit(x, self.shape.norm_eps))
        weights = self._weights(wide(params["logits"]).T, params, depth)
        mixed = depth.mix("jg,j...d->...gd", weights) * params["norm"].astype(x.dtype)
        return norm(x), mixed, mixed, depth


class DynamicHidden(_HiddenRouter):
    """The same with logits computed from the token: norm(S[own]) W.

    Parameters: `project` [l, d, h, j] and `norm` [l, d].
    """

    def init(self, key: Array, dtype: DTypeLike) -> dict[str, Params]:
        s = self.shape
        project = 0.02 * jax.random.normal(key, (s.num_layers, s.d_model, s.num_kv_heads, s.num_layers))
        project = jnp.where(self.mask[:, None, None], project, 0).astype(dtype)
        return {"layers": {"project": project, "norm": jnp.ones((s.num_layers, s.d_model), dtype)}}

    def attention_inputs(self, params, x, norm, depth):
        own = unit(x, self.shape.norm_eps)
        depth = depth.append(own)
        scale = params["norm"].astype(x.dtype)
        scores = jnp.einsum(
            "...d,dgj->j...g",
            own * scale,
            params["project"].astype(x.dtype),
            preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
        )
        mixed = depth.mix("j...g,j...d->...gd", self._weights(scores, params, depth)) * scale
        return norm(x), mixed, mixed, depth


class DynamicViews(Mixer):
    """x-transformers' DynamicLIMe: y[v] = sum over j of softmax(norm(x) W + b)[v, j] S[j], S the inputs of sub-layers.

    Views are the inputs of queries, keys and values at attention, and that of the feed-forward; the usual norm
    follows. A layer writes a slot at each of its sub-layers; in the parallel block, which has one input, one.
    Parameters, for `attention` (v = 3) and for `ff` (v = 1): norm [l, d], weight [l, d, v, j] and bias [l, v, j].
    """

    mixes_rows = True
    mixes_ff = True

    def __init__(self, config: LimeConfig, shape: Shape) -> None:
        super().__init__(config, shape)
        self.per_layer = 1 if shape.parallel_block else 2
        mask = source_mask(config.sources, shape.num_layers)
        self.mask = np.repeat(mask, self.per_layer, axis=1)

    @property
    def slot_shape(self) -> tuple[int, ...]:
        return (self.shape.d_model,)

    def _site_mask(self, site: str) -> np.ndarray:
        """Slots that a sub-layer reads: [l, j]. The feed-forward's slot comes after attention has read."""
        mask = self.mask.copy()
        if site == "attention" and self.per_layer == 2:
            layers = np.arange(self.shape.num_layers)
            mask[layers, 2 * layers + 1] = False
        return mask

    def init(self, key: Array, dtype: DTypeLike) -> dict[str, Params]:
        s, params = self.shape, {}
        bound = s.d_model**-0.5  # of a linear layer in PyTorch
        for number, (site, views) in enumerate((("attention", 3), ("ff", 1))):
            mask = self._site_mask(site)
            keys = jax.random.split(jax.random.fold_in(key, number))
            weight = uniform(keys[0], (s.num_layers, s.d_model, views, self.slots), bound, dtype)
            bias = uniform(keys[1], (s.num_layers, views, self.slots), bound, dtype)
            params[f"{site}_norm"] = jnp.ones((s.num_layers, s.d_model), dtype)
            params[f"{site}_weight"] = jnp.where(mask[:, None, None], weight, 0).astype(dtype)
            params[f"{site}_bias"] = jnp.where(mask[:, None], bias, 0).astype(dtype)
        return {"layers": params}

    def effective(self, params: Params) -> Params:
        return params | {f"{site}_allowed": jnp.asarray(self._site_mask(site)) for site in ("attention", "ff")}

    def _views(self, params: Params, site: str, x: Array, depth: Depth) -> Array:
        """Mixtures [v, ..., d] for rows x [..., d]."""
        normed = unit(x, self.shape.norm_eps) * params[f"{site}_norm"].astype(x.dtype)
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        weight = params[f"{site}_weight"].astype(x.dtype)
        scores = jnp.einsum("...d,dvj->j...v", normed, weight, preferred_element_type=dtype)
        bias = params[f"{site}_bias"].astype(dtype).T
        scores += bias.reshape(len(bias), *[1] * (x.ndim - 1), -1)
        allowed = (params[f"{site}_allowed"] & depth.readable(self.slots)).reshape(-1, *[1] * x.ndim)
        if self.config.activation == "softmax":
            weights = softmax(jnp.where(allowed, scores, -jnp.inf))
        else:
            weights = jnp.where(allowed, jax.nn.relu(scores), 0)
        return depth.mix("j...v,j...d->v...d", weights)

    def attention_inputs(self, params, x, norm, depth):
        depth = depth.append(x)
        q, k, v = (norm(view) for view in self._views(params, "attention", x, depth))
        return q, k, v, depth

    def ff_input(self, params: Params, x: Array, norm: Norm, depth: Depth) -> tuple[Array, Depth]:
        if not self.shape.parallel_block:
            depth = depth.append(x)
        return norm(self._views(params, "ff", x, depth)[0]), depth


# Weights that say what is read, apart from norms: they learn ten times as fast as others and do not decay.
ROUTER_WEIGHTS = frozenset(
    {"router", "token", "logits", "project", "attention_weight", "attention_bias", "ff_weight", "ff_bias"}
)

ROUTERS = {
    "static_kv": StaticKV,
    "average": Average,
    "dynamic_kv": DynamicKV,
    "static_hidden": StaticHidden,
    "dynamic_hidden": DynamicHidden,
    "dynamic_views": DynamicViews,
}
