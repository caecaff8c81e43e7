import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jlora.config.run_config import MeshConfig
from jlora.ops.dropout import axis_codes, drop, seeds
from jlora.parallel.sharding import make_mesh

RATE, SIZE = 0.1, 1024


def marks(seed: int) -> np.ndarray:
    """1 / (1 - p) or 0 as numbers of mean 0 and variance 1, [rows, columns]."""
    kept = drop(jnp.ones((SIZE, SIZE)), jax.random.key(seed), RATE) > 0
    return (np.asarray(kept) - (1 - RATE)) / np.sqrt(RATE * (1 - RATE))


def test_the_share_dropped_is_the_rate() -> None:
    assert abs(marks(0).mean()) < 4 / SIZE  # 4 standard deviations


@pytest.mark.parametrize("axis", [0, 1])
def test_rows_and_columns_vary_as_independent_elements_would(axis: int) -> None:
    means = np.sqrt(SIZE) * marks(1).mean(axis)
    assert 0.85 < means.var() < 1.15  # its own deviation is sqrt(2 / 1024) = 0.04


@pytest.mark.parametrize("transposed", [False, True])
def test_no_two_rows_or_columns_are_correlated(transposed: bool) -> None:
    z = marks(2).T if transposed else marks(2)
    products = z @ z.T / np.sqrt(SIZE)
    np.fill_diagonal(products, 0)
    assert 0.97 < products.var() < 1.03
    assert np.abs(products).max() < 7  # of 1M normal numbers it is about 5


def test_masks_of_two_keys_are_independent() -> None:
    assert abs((marks(3) * marks(4)).mean()) < 4 / SIZE


def test_a_mask_has_no_large_singular_value() -> None:
    # Random matrices of mean 0 and variance 1 / n have 2; any structure has more.
    largest = np.linalg.norm(marks(5) / np.sqrt(SIZE), 2)
    assert largest < 2.1


def test_a_mask_does_not_depend_on_the_sharding() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    x = jax.random.normal(jax.random.key(0), (8, 4, 16))
    sharded = jax.device_put(
        x, NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor"))
    )
    function = jax.jit(lambda x: drop(x, jax.random.key(7), 0.5))
    np.testing.assert_array_equal(function(sharded), function(x))


def test_the_codes_of_rows_go_on_from_one_device_to_the_next() -> None:
    mesh = make_mesh(MeshConfig(8), jax.devices()[:8])
    words = [seeds(jax.random.key(i)) for i in range(2)]
    own = jax.shard_map(
        lambda x: axis_codes(words, x.shape),
        mesh=mesh,
        in_specs=PartitionSpec("data"),
        out_specs=[PartitionSpec(None, "data"), PartitionSpec("data")],
        check_vma=False,
    )
    rows, columns = jax.jit(own)(jnp.zeros((32, 24)))
    whole = axis_codes(words, (32, 24))
    np.testing.assert_array_equal(rows, whole[0])
    np.testing.assert_array_equal(columns, np.tile(whole[1], (8, 1)))


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.3, 0.7])
def test_a_rate_that_varies_gives_the_same_as_a_constant(rate: float) -> None:
    x = jax.random.normal(jax.random.key(1), (64, 96))
    key = jax.random.key(2)
    constant = jax.jit(lambda x: drop(x, key, rate))(x)
    varied = jax.jit(lambda x, rate: drop(x, key, rate))(x, jnp.float32(rate))
    np.testing.assert_array_equal(varied, constant)
