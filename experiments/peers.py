"""x-transformers (PyTorch) at the shapes of our models, for `experiments.speed`.

An arm is `x-transformers[+lime][:compile]`: full attention by PyTorch's own fused kernel, rotary positions, RMS norms,
gated feed-forward and tied embeddings, as many weights as the decoder of `full` has; with LIMe its layer integration,
which is `dynamic_views` of ours; and with torch.compile. Needs `pip install -e ".[x-transformers]"`.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from fam_jax import DecoderConfig

_ARM = re.compile(r"x-transformers(\+lime)?(:compile)?")


def is_peer(arm: str) -> bool:
    """Whether an arm is one of these."""
    return _ARM.fullmatch(arm) is not None


def our_arm(arm: str) -> str:
    """The arm of our decoder that has the same shapes."""
    return "full+lime-views" if "+lime" in arm else "full"


def functions(mode: str, config: DecoderConfig, arm: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """As `experiments.arms.functions`, but to be called as they are: `make` and `step`.

    Args:
        mode: "train" or "forward".
        config: Shapes of the decoder, which has full attention.
        arm: Its name.

    Raises:
        ValueError: The mode is another, or a library is not installed.
    """
    if mode not in ("train", "forward"):
        raise ValueError(f"modes has {mode!r}, which x-transformers is not measured in; leave it or {arm!r} out")
    missing = [name for name in ("torch", "x_transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f'{arm!r} needs {missing[0]}: pip install -e ".[x-transformers]"')
    import torch  # heavy, and an extra

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    half = config.dtype == "bfloat16"

    def loss(network: Any, tokens: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=half):
            logits = network(tokens)
        targets = torch.roll(tokens, -1, dims=1)
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def make(key: jax.Array) -> Any:
        torch.manual_seed(0)
        network = model(config, "+lime" in arm).to(device)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=1e-4, fused=True)
        return (torch.compile(network) if arm.endswith(":compile") else network), optimizer

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
            ff_mult=config.d_ff / config.d_model,
            ff_glu=True,
            ff_swish=True,
            ff_no_bias=True,
            integrate_layers=lime,
            verbose=False,
        ),
    )
