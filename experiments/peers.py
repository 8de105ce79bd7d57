"""x-transformers (PyTorch) at the shapes of our models, for `experiments.speed`.

An arm is `x-transformers[+lime][:compile]`: full attention by PyTorch's own fused kernel, rotary positions, RMS norms,
gated feed-forward and tied embeddings, as the decoder of `full:none`, but for the bias of its gate; with LIMe its layer
integration, which is `full+lime-views:none` of ours, but for the first layer's attention; and with torch.compile. Needs
`pip install -e ".[x-transformers]"`. On a GPU, PyTorch keeps memory that it has freed: `--apart` leaves room for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from fam_jax import DecoderConfig

_ARM = re.compile(r"x-transformers(\+lime)?(:compile)?")
# What our decoder has to be like to be compared.
_SAME = {"memory": None, "parallel_block": False, "activation": "silu", "tie_embeddings": True, "qk_norm": False}
_SAME |= {"post_norms": False, "attention_bias": False, "attention_softcap": None, "logit_softcap": None}
_SAME |= {"rope_scaling": None, "local_window": None}


def is_peer(arm: str) -> bool:
    """Whether an arm is one of these."""
    return _ARM.fullmatch(arm) is not None


def our_arm(arm: str) -> str:
    """The arm of our decoder that has the same shapes."""
    return "full+lime-views:none" if "+lime" in arm else "full:none"


def functions(mode: str, config: DecoderConfig, arm: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """As `experiments.arms.functions`, but to be called as they are: `make` and `step`.

    Args:
        mode: "train" or "forward".
        config: Shapes of the decoder, which has full attention.
        arm: Its name.

    Raises:
        ValueError: The mode is another, the model has what x-transformers is not told of here, or PyTorch or
            x-transformers is missing, broken, or has not the device that JAX has.
    """
    if mode not in ("train", "forward"):
        raise ValueError(f"modes has {mode!r}, which x-transformers is not measured in; leave it or {arm!r} out")
    other = [name for name, value in _SAME.items() if getattr(config, name) != value]
    if other:
        raise ValueError(f"{arm!r} has not the {other[0]}={getattr(config, other[0])!r} of the preset; take another")
    try:
        import torch  # heavy, and an extra
        import x_transformers  # noqa: F401
    except (ImportError, OSError) as error:
        raise ValueError(f'{arm!r} needs pip install -e ".[x-transformers]": {error}') from error
    device = {"cpu": "cpu", "gpu": "cuda"}.get(jax.default_backend())
    if device is None or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"{arm!r} cannot run on a {jax.default_backend()} with this PyTorch; leave it out")
    torch.set_float32_matmul_precision("high")  # as JAX computes on a GPU

    def loss(network: Any, tokens: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            logits = network(tokens)
        targets = torch.roll(tokens, -1, dims=1)
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    if arm.endswith(":compile"):
        loss = torch.compile(loss, dynamic=False)

    def make(key: jax.Array) -> Any:
        torch.manual_seed(0)
        network = model(config, "+lime" in arm).to(device)
        return network, torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=1e-4, fused=True)

    def step(carry: Any, tokens: jax.Array) -> Any:
        network, optimizer = carry
        ids = torch.from_numpy(np.asarray(tokens).astype(np.int64)).to(device)
        if mode == "forward":
            with torch.no_grad():
                value = loss(network, ids)
        else:
            optimizer.zero_grad(set_to_none=True)
            value = loss(network, ids)
            value.backward()
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return carry, value.item()

    return make, step


def model(config: DecoderConfig, lime: bool) -> Any:
    """The network with the shapes of a decoder."""
    from x_transformers import Decoder, TransformerWrapper

    return TransformerWrapper(
        num_tokens=config.vocab_size,
        max_seq_len=1 << 20,
        use_abs_pos_emb=False,
        tie_embedding=True,
        attn_layers=Decoder(
            dim=config.d_model,
            depth=config.num_layers,
            heads=config.num_heads,
            attn_dim_head=config.head_dim,
            attn_kv_heads=config.num_kv_heads,
            attn_flash=True,
            rotary_pos_emb=True,
            rotary_emb_dim=config.head_dim,
            use_rmsnorm=True,
            ff_mult=(config.d_ff + 0.5) / config.d_model,  # is rounded down
            ff_glu=True,
            ff_swish=True,
            ff_no_bias=True,
            integrate_layers=lime,
            verbose=False,
        ),
    )
