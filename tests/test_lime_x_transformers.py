"""dynamic_views against x-transformers' DynamicLIMe with copied weights; needs the extra `x-transformers`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_close

from lime_jax import Depth, LimeConfig, Shape, make_mixer

torch = pytest.importorskip("torch", reason='needs pip install -e ".[x-transformers]"')
x_transformers = pytest.importorskip("x_transformers.x_transformers", reason="as torch")

LAYERS, WIDTH = 4, 8


@pytest.mark.parametrize("activation", ["softmax", "relu"])
@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize(("site", "views"), [("attention", 3), ("ff", 1)])
def test_same_mixture(site, views, layer, activation):
    shape = Shape(LAYERS, WIDTH, num_heads=2, num_kv_heads=2, head_dim=4, norm_eps=0.0)
    mixer = make_mixer(LimeConfig("dynamic_views", activation=activation), shape)
    params = jax.tree.map(lambda x: x[layer], mixer.effective(mixer.init(jax.random.key(layer), "float32")["layers"]))
    rng = np.random.default_rng(layer)
    params[f"{site}_norm"] = jnp.asarray(rng.standard_normal(WIDTH), jnp.float32)
    reads = 2 * layer + (1 if site == "attention" else 2)  # inputs of sub-layers so far, its own the last
    hiddens = rng.standard_normal((reads, 2, 5, WIDTH)).astype(np.float32)

    theirs = x_transformers.DynamicLIMe(WIDTH, reads, num_views=views, use_softmax=activation == "softmax")
    linear = next(m for m in theirs.modules() if isinstance(m, torch.nn.Linear))
    norm = next(m for m in theirs.modules() if isinstance(m, x_transformers.RMSNorm))
    with torch.no_grad():
        weight = np.asarray(params[f"{site}_weight"])[:, :, :reads].reshape(WIDTH, -1).T
        linear.weight.copy_(torch.tensor(np.ascontiguousarray(weight)))
        linear.bias.copy_(torch.tensor(np.asarray(params[f"{site}_bias"])[:, :reads].reshape(-1)))
        norm.g.copy_(torch.tensor(np.asarray(params[f"{site}_norm"])))
        want = theirs(torch.tensor(hiddens[-1]), torch.tensor(hiddens)).numpy()

    own = 1 if site == "attention" else 2
    bank = jnp.zeros((mixer.slots, 2, 5, WIDTH)).at[: 2 * layer].set(hiddens[: 2 * layer])
    depth = Depth(bank, 2 * layer, layer, tuple(jnp.asarray(x) for x in hiddens[2 * layer : 2 * layer + own - 1]))
    x = jnp.asarray(hiddens[-1])
    if site == "attention":
        got = jnp.stack(mixer.attention_inputs(params, x, lambda y: y, depth)[:3])
    else:
        got = mixer.ff_input(params, x, lambda y: y, depth)[0]
    assert_close(got, want.reshape(got.shape), 1e-5)
