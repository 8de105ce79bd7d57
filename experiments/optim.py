"""Optimisers and learning-rate schedules, put together from optax."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from experiments.typed import check_types
from fam_jax.ops import WEIGHTS
from lime_jax.routers import ROUTER_WEIGHTS

# Every parameter of the decoder is named in exactly one of these two, so that a new one cannot be forgotten.
DECAYED = frozenset(WEIGHTS) | {f"{weight}_{factor}" for weight in WEIGHTS for factor in "ab"}
UNDECAYED = frozenset({"embed", "unembed", "fam_prompt", "attn_norm", "ff_norm", "final_norm", "q_norm", "k_norm"})
UNDECAYED |= {"fam_prefix", "bq", "bk", "bv", "attn_post_norm", "ff_post_norm"}
# Parameters of layer mixers, which do not decay, but for routers if `router_decay` says so.
MIXING = ROUTER_WEIGHTS | {"norm", "attention_norm", "ff_norm", "query", "weights", "static_alpha", "static_beta"}
MIXING |= {"alpha", "beta", "alpha_scale", "beta_scale"}


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Optimiser, learning-rate schedule and clipping.

    Weight decay is decoupled and acts on the projection matrices only: not on norm scales, whose rest is 1,
    nor on rows that a step may not even use (embedding, output weights, the learned FAM prompt).

    Attributes:
        optimizer: "adamw", or "adafactor", which the paper used.
        learning_rate: Peak value. Adafactor multiplies it by the root mean square of each parameter, layer by layer.
        router_scale: Learning rate of LIMe's routers relative to that of all other parameters.
        router_decay: Decoupled weight decay of LIMe's routers, times their learning rate; the paper has none.
        schedule: After the warm-up: "constant", "cosine" or "linear" down to `final_scale` of the peak.
        warmup_steps: Steps of linear rise to the peak, the first at 1 / `warmup_steps` of it.
        decay_steps: Step at which the decay ends, warm-up included; None is the last step of the run. Give it
            when a run may be made longer later, so that the first part does not depend on the second.
        final_scale: Learning rate at the end of the decay, relative to the peak.
        b1: Decay of the first moment. Adafactor keeps none if it is 0.
        b2: Decay of the second moment. With Adafactor, which has no bias correction, the upper limit of
            1 - (step + 1)^-0.8.
        eps: Added to AdamW's root of the second moment.
        weight_decay: Decoupled weight decay, times the learning rate.
        clip_norm: Largest global norm of the gradient; None does not clip.
    """

    optimizer: Literal["adamw", "adafactor"] = "adamw"
    learning_rate: float = 1e-3
    router_scale: float = 10.0
    router_decay: float = 0.0
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    warmup_steps: int = 0
    decay_steps: int | None = None
    final_scale: float = 0.1
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        check_types(self)
        _require(self, "learning_rate", self.learning_rate > 0, "above 0")
        _require(self, "router_scale", self.router_scale > 0, "above 0")
        _require(self, "router_decay", self.router_decay >= 0, "at least 0")
        _require(self, "warmup_steps", self.warmup_steps >= 0, "at least 0")
        good = self.decay_steps is None or self.decay_steps >= 1
        _require(self, "decay_steps", good, "at least 1, or None")
        _require(self, "final_scale", 0 <= self.final_scale <= 1, "between 0 and 1")
        _require(self, "b1", 0 <= self.b1 < 1, "at least 0 and below 1")
        _require(self, "b2", 0 < self.b2 < 1, "between 0 and 1, both excluded")
        _require(self, "eps", self.eps > 0, "above 0")
        _require(self, "weight_decay", self.weight_decay >= 0, "at least 0")
        _require(self, "clip_norm", self.clip_norm is None or self.clip_norm > 0, "above 0, or None")


def _require(config: OptimConfig, field: str, good: bool, allowed: str) -> None:
    if not good:
        value = getattr(config, field)
        raise ValueError(f"OptimConfig.{field}={value!r} is not allowed; it must be {allowed}")


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """The learning rate as a function of the number of updates already made.

    Args:
        config: The settings.
        steps: Steps of the run, the end of the decay unless the config says another.

    Raises:
        ValueError: The decay would end before the warm-up does.
    """
    peak, end = config.learning_rate, config.decay_steps or steps
    decay = end - config.warmup_steps
    if config.schedule == "constant" or not steps:
        rest = optax.constant_schedule(peak)
    elif decay < 1:
        raise ValueError(
            f"OptimConfig.warmup_steps={config.warmup_steps} leaves nothing of the {end} steps for the "
            f"{config.schedule} decay; make the warm-up shorter or the run longer"
        )
    elif config.schedule == "cosine":
        rest = optax.cosine_decay_schedule(peak, decay, alpha=config.final_scale)
    else:
        rest = optax.linear_schedule(peak, peak * config.final_scale, decay)
    if not config.warmup_steps:
        return rest
    warmup = optax.linear_schedule(peak / config.warmup_steps, peak, max(config.warmup_steps - 1, 1))
    return optax.join_schedules([warmup, rest], [config.warmup_steps])


def decay_mask(params: Any) -> Any:
    """True for the parameters on which weight decay acts, in a tree like `params`.

    Raises:
        ValueError: A parameter is in neither of the two lists above.
    """

    def decayed(path: tuple, _: Any) -> bool:
        name = path[-1].key
        if name not in (MIXING if path[0].key == "mixing" else DECAYED | UNDECAYED):
            raise ValueError(
                f"parameter {jax.tree_util.keystr(path, simple=True, separator='/')} is new to the "
                "optimiser; add its name to DECAYED, UNDECAYED or MIXING in experiments/optim.py"
            )
        return name in DECAYED

    return jax.tree_util.tree_map_with_path(decayed, params)


def _by_layer(blocks: optax.GradientTransformation) -> optax.GradientTransformation:
    """A stateless transformation of whole arrays, applied to every layer by itself where layers are stacked."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def one(path: tuple, *arrays: Any) -> Any:
            def apply(update: Any, param: Any) -> Any:
                return blocks.update(update, state, param)[0]

            stacked = any(part.key == "layers" for part in path)
            return (jax.vmap(apply) if stacked else apply)(*arrays)

        return jax.tree_util.tree_map_with_path(one, updates, params), state

    return optax.GradientTransformation(blocks.init, update)


def _adafactor(
    config: OptimConfig, schedule: optax.Schedule, decay: float, mask: Callable[[Any], Any]
) -> optax.GradientTransformation:
    # Not optax.adafactor: it has no upper limit for the second moment's decay, which the paper gives as 0.99,
    # its weight decay ignores the learning rate, and it would clip and scale all layers of a stack by the size that
    # they have together. Without these three the updates are the same (a test compares them). Second moments are
    # factored over a weight's two largest axes, which the layers of a stack are not.
    def second_moment_decay(step: Any, rate: Any) -> jax.Array:
        return jnp.minimum(1.0 - (jnp.asarray(step, jnp.float32) + 1.0) ** -rate, config.b2)

    return optax.chain(
        optax.scale_by_factored_rms(decay_rate_fn=second_moment_decay),
        _by_layer(optax.clip_by_block_rms(1.0)),
        _by_layer(optax.scale_by_param_block_rms()),
        optax.ema(config.b1, debias=False) if config.b1 else optax.identity(),
        optax.add_decayed_weights(decay, mask=mask),
        optax.scale_by_learning_rate(schedule),
    )


def make_optimizer(config: OptimConfig, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimiser of a run of `steps` steps, and its learning rate as a function of the step."""
    schedule = make_schedule(config, steps)

    def for_routers(step: Any) -> Any:
        return config.router_scale * schedule(step)

    def all_of(params: Any) -> Any:
        return jax.tree.map(lambda _: True, params)

    groups = {
        "router": _update(config, for_routers, config.router_decay, all_of),
        "other": _update(config, schedule, config.weight_decay, decay_mask),
    }
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    return optax.chain(clip, optax.partition(groups, parameter_groups)), schedule


def parameter_groups(params: Any) -> Any:
    """Group of each parameter, "router" or "other", in a tree like `params`."""

    def group(path: tuple, _: Any) -> str:
        return "router" if path[0].key == "mixing" and path[-1].key in ROUTER_WEIGHTS else "other"

    return jax.tree_util.tree_map_with_path(group, params)


def _update(
    config: OptimConfig, schedule: optax.Schedule, decay: float, mask: Callable[[Any], Any]
) -> optax.GradientTransformation:
    if config.optimizer == "adafactor":
        return _adafactor(config, schedule, decay, mask)
    return optax.adamw(
        schedule,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=decay,
        mask=mask,
    )
