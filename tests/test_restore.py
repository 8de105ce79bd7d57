"""Checkpoints from one mesh, or number of processes, on another; each in processes of its own."""

import pytest
from test_sharding import eight_devices


@pytest.mark.slow
def test_all_pairs_of_six_meshes():
    eight_devices(files=("mesh_pairs.py",))
