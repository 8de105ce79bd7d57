"""What the backward pass finds kept of the forward pass, and what it computes again: `DecoderConfig.remat`.

Everything that is kept takes memory for every layer until the backward pass gets there; what is not is computed a
second time. The FAM that left each block, a few rows, is always kept, but where scanned layers that read each other are
written once (`lime_jax.stack`): so the backward pass need not compute the end of its updates. Kept of a layer beside
it, in numbers per token (d width, e feed-forward width, h query and g
key/value heads of k):

| name | kept | about |
|---|---|---|
| none | everything, attention scores too | grows with the keys that a token sees |
| dots | products of activations with weights | 2d + 2e + (h + 2g)k |
| attention | queries, keys, values, and what attention gives | d + (2h + 2g)k |
| full | the layer's input | d |

Of attention by cuDNN or splash kernels, "dots" and "attention" also keep what it gives, hk more, so that it is computed
once.

Where blocks of the text are spread over devices, the FAM's updates are always computed again, by all devices at once;
what the turns of the FAM gave is kept.
"""

from collections.abc import Callable
from typing import Any

import jax

# Names that `jax.ad_checkpoint.checkpoint_name` gives in `fam_jax.sublayers`, `fam`, `cudnn` and `splash`.
PROJECTED, ATTENDED, UPDATED, FUSED = "projected", "attended", "updated", "fused"

POLICIES: dict[str, Callable[..., Any] | None] = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(UPDATED, FUSED),
    ),
    "attention": jax.checkpoint_policies.save_only_these_names(PROJECTED, ATTENDED, UPDATED, FUSED),
    "full": jax.checkpoint_policies.save_only_these_names(UPDATED),
}


def recompute(remat: str, step: Callable[..., Any]) -> Callable[..., Any]:
    """The body of a `jax.lax.scan`, whose backward pass computes again what the policy does not keep.

    Args:
        remat: One of POLICIES.
        step: The body.
    """
    if remat == "none":
        return step
    return jax.checkpoint(step, prevent_cse=False, policy=POLICIES[remat])
