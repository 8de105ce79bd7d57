"""TransformerFAM: a decoder with feedback attention memory that reads endless text at constant memory."""

from fam_jax import presets
from fam_jax.config import DecoderConfig, LoraConfig, MemoryConfig
from fam_jax.decoder import Decoder, DecoderOutput
from fam_jax.generate import GenerateOutput, generate
from fam_jax.sharding import MeshConfig, ShardingRules, make_mesh, tree_shardings
from fam_jax.state import RSPState, StreamState

__version__ = "0.1.0"

__all__ = [
    "Decoder",
    "DecoderConfig",
    "DecoderOutput",
    "GenerateOutput",
    "LoraConfig",
    "MemoryConfig",
    "MeshConfig",
    "RSPState",
    "ShardingRules",
    "StreamState",
    "generate",
    "make_mesh",
    "presets",
    "tree_shardings",
]
