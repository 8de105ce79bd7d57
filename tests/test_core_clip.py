"""The limit to the size of FAM rows."""

import dataclasses

import jax
import numpy as np
import pytest
from reference import assert_close, fam_config, params_of, runner, some_tokens

TEXT = some_tokens(2, 23, seed=4)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def sizes(state):
    return np.sqrt(np.mean(np.square(np.asarray(state.fam)), axis=-1))


def test_rows_stay_below_the_limit_and_keep_their_direction(x64):
    free, limited = fam_config(), fam_config({"clip": 0.5})
    params = params_of(free)
    one_block = TEXT[:, : free.memory.block_size]
    before, after = (runner(config)(params, one_block).state for config in (free, limited))
    assert np.all(sizes(before)[0] > 0.5)  # the limit does something
    first, second = np.asarray(before.fam)[0], np.asarray(after.fam)[0]  # the first layer's input is the same in both
    np.testing.assert_allclose(second / sizes(after)[0][..., None], first / sizes(before)[0][..., None], rtol=1e-10)
    assert np.all(sizes(runner(limited)(params, TEXT).state) <= 0.5 + 1e-12)


def test_a_limit_that_is_never_reached_changes_nothing(x64):
    free, limited = fam_config(), fam_config({"clip": 1e6})
    params = params_of(free)
    np.testing.assert_array_equal(runner(free)(params, TEXT).logits, runner(limited)(params, TEXT).logits)


def test_schedules_agree_under_the_limit(x64):
    limited = fam_config({"clip": 0.5})
    params = params_of(limited)
    one = runner(limited)(params, TEXT)
    two = runner(dataclasses.replace(limited, schedule="block"))(params, TEXT)
    assert_close(two.logits, one.logits)
    assert_close(two.state.fam, one.state.fam)
