"""Attention block by block is attention."""

import jax
import jax.numpy as jnp
import numpy as np

from fam_jax.ops import Source, attend, attend_by_block


def test_attention_block_by_block():
    def draw(number, *shape):
        return jax.random.normal(jax.random.fold_in(jax.random.key(0), number), shape)

    seen = jnp.tril(jnp.ones((4, 4), bool))  # of a block's tokens, the same in all blocks
    segment = jnp.array([[0, 1, 1], [1, 1, 0]], bool)[:, :, None, None]  # rows and blocks that have one

    def loss(attend, arrays):
        q, k, v, older_k, older_v = arrays
        sources = [Source(k, v, seen), Source(older_k, older_v, segment), Source(k[:, :, :2], v[:, :, :2])]
        out = attend(q, sources)
        return jnp.sum(jnp.sin(out)), out

    arrays = (draw(0, 2, 3, 4, 4, 8), *(draw(number, 2, 3, 4, 2, 8) for number in range(1, 5)))
    results = [jax.jit(jax.grad(lambda x, f=f: loss(f, x), has_aux=True))(arrays) for f in (attend, attend_by_block)]
    for whole, by_block in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(by_block, whole, rtol=1e-5, atol=1e-5)
