"""Endless text takes constant memory, and a token does not copy what is kept."""

import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import fam_config, params_of

from fam_jax import Decoder

F32 = dict(dtype="float32", param_dtype="float32")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_a_million_tokens_stream_in_constant_memory():
    """State size and process memory stay where they are after a warm-up, and the numbers stay finite."""
    config = fam_config({"block_size": 25, "fam_length": 4}, num_layers=1, **F32)
    model, params, chunk = Decoder(config), jax.device_put(params_of(config)), 5000

    @jax.jit  # compiled to run fast
    def run(params, tokens, state):
        return model.apply({"params": params}, tokens, state=state)

    state = model.init_state(1)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    rng = np.random.default_rng(9)
    texts = [jnp.asarray(rng.integers(0, config.vocab_size, (1, chunk)), jnp.int32) for _ in range(8)]
    resident = []
    for i in range(1_000_000 // chunk):
        out = run(params, texts[i % 8], state)
        state = jax.block_until_ready(out.state)
        if sys.platform == "linux":
            resident.append(resident_bytes())
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == shapes
    assert int(state.blocks[0]) * 25 + int(state.offset[0]) == 1_000_000
    assert np.all(np.isfinite(out.logits))
    if resident:  # 20 calls of warm-up, then 900,000 tokens whose states alone would be 180 copies
        assert max(resident[20:]) - resident[20] < 30 * 2**20


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("scan_layers", [True, False])
def test_a_token_leaves_the_segments_where_they_are(scan_layers, remat):
    """No loop over layers hands them on, which would copy all of the cache for every token."""
    config = fam_config({"segments": 3}, scan_layers=scan_layers, remat=remat, num_layers=3, **F32)
    model, state = Decoder(config), jax.eval_shape(lambda: Decoder(config).init_state(2))
    token = jax.ShapeDtypeStruct((2, 1), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), token)
    jaxpr = jax.make_jaxpr(lambda *args: model.apply(*args).state)(variables, token, state)

    def stacked(jaxpr):
        """Shapes of what loops give, compiled ones and unrolled ones."""
        for equation in jaxpr.eqns:
            # The loop over a single window is none.
            if equation.primitive.name in ("scan", "concatenate", "stack") and equation.params.get("length") != 1:
                yield from (var.aval.shape for var in equation.outvars)
            for part in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from stacked(inner)

    shapes = set(stacked(jaxpr.jaxpr))
    assert state.open_k.shape in shapes
    assert state.segment_k.shape not in shapes
