"""LIMe in a Flax model of your own: `python -m experiments.examples.lime_in_flax`.

The model below knows nothing of this project's decoder. The marked lines are all that LIMe adds to it. It learns to
predict the bytes of its own source, with and without LIMe, and shows which layers its router reads.
"""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lime_jax import Depth, LimeConfig, Shape, make_mixer


class TinyTransformer(nn.Module):
    """Pre-norm Transformer with learned positions: tokens int [b, t] to logits [b, t, vocab]."""

    lime: LimeConfig | None
    vocab: int = 256
    layers: int = 4
    width: int = 64
    heads: int = 4

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Predicts the token after each."""
        head_dim = self.width // self.heads
        shape = Shape(self.layers, self.width, self.heads, self.heads, head_dim)  # LIMe
        mixer = make_mixer(self.lime, shape)  # LIMe; None is no mixing
        router: dict = {}
        if self.lime is not None:
            router = mixer.effective(self.param("lime", mixer.init, "float32")["layers"])  # LIMe
        slots: list[jax.Array] = []  # LIMe: what earlier layers have written

        def project(name: str) -> nn.DenseGeneral:
            return nn.DenseGeneral((self.heads, head_dim), use_bias=False, name=name)

        positions = self.param("positions", nn.initializers.normal(0.02), (tokens.shape[1], self.width))
        x = nn.Embed(self.vocab, self.width)(tokens) + positions
        for layer in range(self.layers):
            h = nn.LayerNorm()(x)
            q, k, v = (project(f"{name}{layer}")(h) for name in "qkv")
            one = jax.tree.map(lambda leaf, layer=layer: leaf[layer], router)  # LIMe
            depth = Depth(jnp.stack(slots) if slots else None, live=layer, layer=layer)  # LIMe
            k, v, depth = mixer.keys_values(one, h, q, k, v, depth)  # LIMe
            slots += depth.own  # LIMe
            y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
            x += nn.DenseGeneral(self.width, axis=(-2, -1), use_bias=False)(y)
            x += nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x))))
        return nn.Dense(self.vocab)(nn.LayerNorm()(x))


def train(lime: LimeConfig | None, steps: int = 200, length: int = 64) -> tuple[list[float], dict]:
    """Losses of every step, and the parameters after the last."""
    text = jnp.frombuffer(Path(__file__).read_bytes(), jnp.uint8).astype(jnp.int32)
    model, optimizer = TinyTransformer(lime), optax.adamw(1e-3)
    params = model.init(jax.random.key(0), jnp.zeros((1, length), jnp.int32))["params"]

    @jax.jit
    def step(params, state, key):
        start = jax.random.randint(key, (16, 1), 0, len(text) - length)
        rows = text[start + jnp.arange(length + 1)]

        def loss_fn(params):
            logits = model.apply({"params": params}, rows[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses = optimizer.init(params), []
    for number in range(steps):
        params, state, loss = step(params, state, jax.random.fold_in(jax.random.key(1), number))
        losses.append(float(loss))
    return losses, params


def main() -> None:
    """Trains both models."""
    for name, lime in (("without LIMe", None), ("with LIMe", LimeConfig())):
        losses, params = train(lime)
        print(f"{name}: loss {losses[0]:.2f} at first, {sum(losses[-20:]) / 20:.2f} over the last 20 of {len(losses)}")
    share = np.abs(params["lime"]["layers"]["router"]).sum((1, 3))  # [layer, source layer]
    print("share of each source layer (columns) in each layer (rows) after the first:")
    print(np.round(share[1:] / share[1:].sum(1, keepdims=True), 2))


if __name__ == "__main__":
    main()
