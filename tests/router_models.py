"""Models with every kind of router, for the tests of what is read from them."""

from reference import N, decoder_config, params_of, quick_jit

from fam_jax.layer_states import layer_states
from lime_jax import LimeConfig, make_mixer
from lime_jax.mixer import shape_of

LAYERS = 3
FAM = {"segments": 1, "fam_length": N}
STATIC = {
    "static_kv": LimeConfig(),
    "separate": LimeConfig(separate_kv=True),
    "same head": LimeConfig(same_head=True, sources="last:2"),
    "separate, same head": LimeConfig(separate_kv=True, same_head=True),
    "static_hidden": LimeConfig("static_hidden", sources="first:1"),
}
DYNAMIC = {
    "dynamic_kv": LimeConfig("dynamic_kv"),
    "dynamic_kv, separate": LimeConfig("dynamic_kv", separate_kv=True),
    "dynamic_hidden": LimeConfig("dynamic_hidden", sources="last:2"),
    "dynamic_views": LimeConfig("dynamic_views"),
    "dynamic_views, relu": LimeConfig("dynamic_views", activation="relu"),
}


def full(mixing, **changes):
    return decoder_config(num_layers=LAYERS, mixing=mixing, **changes)


def mixer_of(config):
    return make_mixer(config.mixing, shape_of(config))


def router_of(config):
    return params_of(config)["mixing"]["layers"]


def states_of(config, tokens, lengths=None):
    return quick_jit(lambda params: layer_states(config, params, tokens, lengths))(params_of(config))
