"""One process of a job that saves a checkpoint, or restores those of other jobs; `test_restore.py` starts it.

python process_pairs.py PORT PROCESSES NUMBER FOLDER save|restore
"""

import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from mesh_pairs import MESHES, MeshConfig, gathered, random_state, restore, save
from train_helpers import assert_same_bits

from experiments import distributed

COUNTS = (1, 2, 4)
LAYOUT = "four devices"
MESHES[LAYOUT] = ("fsdp_tp", MeshConfig(tensor=2), 4)


def main(port, count, number, folder, what):
    if count > 1:
        distributed.start(distributed.Processes(f"127.0.0.1:{port}", count, number))
    assert (jax.process_count(), jax.device_count()) == (count, 4)
    if what == "save":
        save(folder / str(count), LAYOUT)
        return
    for other in COUNTS:
        state, logits = restore(folder / str(other), LAYOUT)
        if count == 1:
            assert_same_bits(gathered(state), gathered(random_state(state)))
        leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(gathered(state))}
        leaves["logits"] = np.asarray(multihost_utils.process_allgather(logits, tiled=True))
        if distributed.is_main():
            np.savez(folder / f"{other}-{count}.npz", **leaves)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), sys.argv[5])
