"""What the `config.json` of a Hugging Face model says, as `DecoderConfig`, and back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from fam_jax.config import DecoderConfig
from fam_jax.rope import RopeScaling

# By `model_type`, what a config.json may leave out; `gemma3` has its text model's under `text_config`.
_LLAMA = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "tie_word_embeddings": False}
_GEMMA = {
    **_LLAMA,
    "hidden_act": "gelu_pytorch_tanh",
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
}
_LOCAL_GEMMA = {**_GEMMA, "sliding_window": 4096}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {**_LLAMA, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {**_LLAMA, "head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
    "gemma": {name: value for name, value in _GEMMA.items() if name != "query_pre_attn_scalar"},
    "gemma2": {**_LOCAL_GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": {
        **_LOCAL_GEMMA,
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "sliding_window_pattern": 6,
    },
}
GEMMA = ("gemma", "gemma2", "gemma3_text")
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu"}

# Fields that must not be set, as the decoder has nothing like them.
_REFUSED = ("quantization_config", "mlp_bias", "use_bidirectional_attention", "use_qk_norm", "attention_multiplier")

# Fields of DecoderConfig that say how a model is used or computed, and not which function it is.
OWN = frozenset(
    {
        "memory",
        "mixing",
        "schedule",
        "attention",
        "dtype",
        "param_dtype",
        "remat",
        "scan_layers",
        "sharding",
        "lora",
    }
)


def family_of(theirs: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The family of a `config.json`, a key of DEFAULTS, and its fields, with those that it leaves out.

    Raises:
        ValueError: The family is not known.
    """
    kind = theirs.get("model_type")
    if kind == "gemma3":
        outer = {name: theirs[name] for name in ("tie_word_embeddings", "quantization_config") if name in theirs}
        return family_of({**outer, **theirs.get("text_config", {}), "model_type": "gemma3_text"})
    if kind not in DEFAULTS:
        raise ValueError(f"model_type={kind!r} is not supported; there are {', '.join(DEFAULTS)}")
    return kind, {**DEFAULTS[kind], **theirs}


def query_scale(theirs: Mapping[str, Any], head_dim: int) -> float:
    """What queries are multiplied by besides the usual head_dim^-1/2."""
    return (head_dim / theirs.get("query_pre_attn_scalar", head_dim)) ** 0.5


def decoder_config(theirs: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that computes the same, with full attention.

    Raises:
        ValueError: Something is missing or not supported; the message names the field.
    """
    family, fields = family_of(theirs)

    def number(name: str) -> int:
        if not isinstance(fields.get(name), int):
            raise ValueError(f"config.json of a {family} model needs {name}, a whole number, not {fields.get(name)!r}")
        return fields[name]

    for name in (*_REFUSED, *(("attention_bias",) if family != "qwen2" else ())):
        if fields.get(name):
            raise ValueError(f"{name}={fields[name]!r} of a {family} model is not supported")
    if fields.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ValueError(f"partial_rotary_factor={fields['partial_rotary_factor']!r} is not supported; only 1 is")
    # Gemma 1's files say gelu, and mean its tanh approximation, as `hidden_activation` does in later ones.
    activation = fields.get("hidden_activation") or fields["hidden_act"]
    if family == "gemma" and activation == "gelu":
        activation = "gelu_pytorch_tanh"
    if activation not in _ACTIVATIONS:
        raise ValueError(f"hidden_act={activation!r} is not supported; there are {', '.join(_ACTIVATIONS)}")
    heads, layers = number("num_attention_heads"), number("num_hidden_layers")
    base, scaling, local_base = _rope(family, fields)
    local = _local_layers(family, fields, layers)
    if not any(local):
        local_base = None
    return DecoderConfig(
        vocab_size=number("vocab_size"),
        num_layers=layers,
        d_model=number("hidden_size"),
        num_heads=heads,
        num_kv_heads=fields.get("num_key_value_heads") or heads,
        head_dim=fields.get("head_dim") or number("hidden_size") // heads,
        d_ff=number("intermediate_size"),
        activation=_ACTIVATIONS[activation],
        attention_bias=family == "qwen2",
        post_norms=family in ("gemma2", "gemma3_text"),
        qk_norm=family in ("qwen3", "gemma3_text"),
        tie_embeddings=bool(fields["tie_word_embeddings"]),
        attention_softcap=fields.get("attn_logit_softcapping"),
        logit_softcap=fields.get("final_logit_softcapping"),
        rope_base=base,
        rope_scaling=scaling,
        local_window=number("sliding_window") if any(local) else None,
        local_layers=() if all(local) or not any(local) else local,
        local_rope_base=local_base,
        norm_eps=float(fields["rms_norm_eps"]),
    )


def _rope(family: str, fields: Mapping[str, Any]) -> tuple[float, RopeScaling | None, float | None]:
    """Base, scaling, and base in local layers; None is the same as elsewhere."""
    given = fields.get("rope_parameters") or {}
    local_base = fields.get("rope_local_base_freq")
    if "full_attention" in given:
        local_base = given.get("sliding_attention", {}).get("rope_theta", local_base)
        given = given["full_attention"]
    given = {"rope_theta": fields["rope_theta"], **(fields.get("rope_scaling") or {}), **given}
    kind = given.get("rope_type", given.get("type", "default"))
    base = float(given["rope_theta"])
    local_base = None if local_base is None else float(local_base)
    if kind == "default":
        return base, None, local_base
    if kind == "linear":
        return base, RopeScaling("linear", float(given["factor"])), local_base
    if kind == "llama3":
        turns = (float(given["low_freq_factor"]), float(given["high_freq_factor"]))
        original = given["original_max_position_embeddings"]
        return base, RopeScaling("llama3", float(given["factor"]), *turns, original), local_base
    raise ValueError(f"rope_type={kind!r} of a {family} model is not supported; there are default, linear, llama3")


def _local_layers(family: str, fields: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    """For each layer whether it is local."""
    none = (False,) * layers
    if fields.get("sliding_window") is None or family in ("llama", "gemma"):
        return none
    if family == "mistral":
        return (True,) * layers
    if family in ("qwen2", "qwen3") and not fields.get("use_sliding_window"):
        return none
    types = fields.get("layer_types")
    if types is not None:
        known = ("sliding_attention", "full_attention")
        if len(types) != layers or any(kind not in known for kind in types):
            raise ValueError(f"layer_types={types!r} is not supported; each layer has one of {', '.join(known)}")
        return tuple(kind == "sliding_attention" for kind in types)
    if family in ("qwen2", "qwen3"):
        return tuple(layer >= fields["max_window_layers"] for layer in range(layers))
    pattern = 2 if family == "gemma2" else fields["sliding_window_pattern"]
    return tuple((layer + 1) % pattern != 0 for layer in range(layers))


def hugging_face_config(config: DecoderConfig, max_length: int) -> dict[str, Any]:
    """The `config.json` of a model with the same function, of the first family that has it.

    Args:
        config: With full attention or BSWA, of which theirs know nothing.
        max_length: Tokens that the model should be given at most; they keep it in the file.

    Raises:
        ValueError: No family computes the same; names the fields that none has together.
    """
    if config.post_norms:
        family = "gemma3_text" if config.qk_norm else "gemma2"
    elif config.activation == "gelu":
        family = "gemma"
    elif config.attention_bias or config.qk_norm:
        family = "qwen2" if config.attention_bias else "qwen3"
    else:
        family = "llama" if config.local_window is None else "mistral"
    names = {"gemma": "Gemma", "gemma2": "Gemma2", "gemma3_text": "Gemma3", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    scaling: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        ours = config.rope_scaling
        scaling = {"rope_type": ours.kind, "factor": ours.factor}
        if ours.kind == "llama3":
            scaling |= {"low_freq_factor": ours.low, "high_freq_factor": ours.high}
            scaling |= {"original_max_position_embeddings": ours.original}
    activation = "gelu_pytorch_tanh" if config.activation == "gelu" else "silu"
    theirs: dict[str, Any] = {
        "architectures": [f"{names.get(family, family.capitalize())}ForCausalLM"],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.d_model,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_ff,
        "hidden_act": activation,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": max_length,
        "rope_theta": config.rope_base,
        "rope_scaling": None if config.rope_scaling is None else scaling,
        "sliding_window": config.local_window,
        "attention_bias": family == "qwen2",
    }
    if family in GEMMA:
        theirs["hidden_activation"] = activation
    if family not in ("llama", "mistral", "gemma"):
        theirs["layer_types"] = ["sliding_attention" if local else "full_attention" for local in config.is_local]
        theirs["use_sliding_window"] = config.local_window is not None
    if family in ("gemma2", "gemma3_text"):
        theirs |= {
            "query_pre_attn_scalar": config.head_dim,
            "attn_logit_softcapping": config.attention_softcap,
            "final_logit_softcapping": config.logit_softcap,
        }
        if config.local_window is None:  # theirs must be a number
            theirs["sliding_window"] = max_length
    if family == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": config.local_rope_base or config.rope_base}
        theirs["rope_parameters"] = {
            "full_attention": {**scaling, "rope_theta": config.rope_base},
            "sliding_attention": local,
        }
        theirs["rope_local_base_freq"] = local["rope_theta"]  # so their library says it before version 5
    differing = [
        name for name in _function(config) if _function(config)[name] != _function(decoder_config(theirs))[name]
    ]
    if differing:
        found = ", ".join(f"DecoderConfig.{name}={getattr(config, name)!r}" for name in differing)
        raise ValueError(f"no supported Hugging Face family has {found} as this model has; nearest is {family}")
    return theirs


def _function(config: DecoderConfig) -> dict[str, Any]:
    """The fields on which the function depends, one that says the same in two ways said in one."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name not in OWN}
    local_base = config.local_rope_base or (None if config.rope_scaling else config.rope_base)
    return fields | {"local_layers": config.is_local, "local_rope_base": local_base if any(config.is_local) else None}
