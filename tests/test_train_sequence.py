"""What the trainer says of texts that are spread over devices, and what it refuses."""

import dataclasses

import pytest
from jax.sharding import AbstractMesh
from train_helpers import tiny, with_model

from experiments.config import check_mesh
from experiments.data.passkey import PasskeyData
from fam_jax.sharding import MESH_AXES

MESH = AbstractMesh((1, 1, 1, 4), MESH_AXES)


def refused(config, message):
    check_mesh(config, AbstractMesh((1, 4, 1, 1), MESH_AXES))
    with pytest.raises(ValueError, match=message):
        check_mesh(config, MESH)


def test_rows_must_be_whole_shares(tmp_path):
    config = tiny(tmp_path)
    block = config.model.memory.block_size
    fits = dataclasses.replace(config, data=dataclasses.replace(config.data, length=8 * block))
    check_mesh(fits, MESH)
    odd = dataclasses.replace(config, data=dataclasses.replace(config.data, length=6 * block))
    refused(odd, rf"data.length={6 * block} .* must be a multiple of 4 x {block} \(model.memory.block_size\)")


def test_what_has_no_blocks_is_refused(tmp_path):
    config = tiny(tmp_path)
    refused(with_model(config, memory=None), r"not allowed with full attention \(model.memory=None\)")
    refused(with_model(config, schedule="block"), "not allowed with model.schedule='block'")


def test_passkey_is_refused(tmp_path):
    config = dataclasses.replace(tiny(tmp_path), data=PasskeyData(batch_size=2))
    refused(config, "mesh.sequence=4 is not allowed with the PassKey task")
