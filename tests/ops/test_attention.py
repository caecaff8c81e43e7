from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.errors import UsageError
from jlora.ops.attention import attend
from jlora.ops.attention_cached import attend_cached
from jlora.ops.compute_choices import Compute

CPU, GPU = Compute("cpu"), Compute("gpu")
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 0], [1, 2, 2, 3, 3, 3, 0, 0]], np.int32)


def random_heads(length, heads, seed):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((2, length, heads, 4)).astype(np.float32)


def case(*, queries=8, keys=8, heads=6, kv_heads=2):
    q = random_heads(queries, heads, 0)
    return q, random_heads(keys, kv_heads, 1), random_heads(keys, kv_heads, 2)


def by_hand(q, k, v, *, segment_ids=None, offset=0):
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    out = np.empty(q.shape)
    for b, t, n in np.ndindex(q.shape[:3]):
        kv = n // (q.shape[2] // k.shape[2])
        seen = [
            s
            for s in range(k.shape[1])
            if s <= t + offset
            and (segment_ids is None or segment_ids[b, s] == segment_ids[b, t])
        ]
        scores = k[b, seen, kv] @ q[b, t, n] / 2
        shares = np.exp(scores - scores.max())
        out[b, t, n] = shares @ v[b, seen, kv] / shares.sum()
    return out


def attend_to(arrays: Any, compute: Compute, **settings: Any) -> Any:
    q, k, v = arrays
    return attend(q, k, v, compute, **settings)


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("segment_ids", [None, SEGMENTS])
def test_attention_equals_loops_over_heads(kv_heads, segment_ids):
    arrays = case(kv_heads=kv_heads)
    given = None if segment_ids is None else jnp.asarray(segment_ids)
    found = attend_to(map(jnp.asarray, arrays), CPU, segment_ids=given)
    expected = by_hand(*arrays, segment_ids=segment_ids)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("segment_ids", [None, SEGMENTS])
def test_blocks_of_queries_and_the_reference_elsewhere_equal_loops_over_heads(
    monkeypatch, segment_ids
):
    arrays = case()
    given = None if segment_ids is None else jnp.asarray(segment_ids)
    expected = by_hand(*arrays, segment_ids=segment_ids)
    monkeypatch.setattr("jlora.ops.attention_cpu._LEAST_QUERIES", 3)  # 3, 3 and 2 of 8
    found = attend_to(map(jnp.asarray, arrays), CPU, segment_ids=given)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    found = attend_to(map(jnp.asarray, arrays), GPU, segment_ids=given)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("segment_ids", [None, SEGMENTS])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_gradients_of_blocks_are_those_of_the_reference(
    monkeypatch, segment_ids, dtype, bound
):
    arrays = [jnp.asarray(x, dtype) for x in case()]
    exact = [x.astype(jnp.float32) for x in arrays]
    d_out = jnp.asarray(random_heads(8, 6, 3), dtype)
    given = None if segment_ids is None else jnp.asarray(segment_ids)
    monkeypatch.setattr("jlora.ops.attention_cpu._LEAST_QUERIES", 3)  # 3, 3 and 2 of 8
    found = jax.vjp(lambda *x: attend_to(x, CPU, segment_ids=given), *arrays)[1](d_out)
    pull = jax.vjp(lambda *x: attend_to(x, GPU, segment_ids=given), *exact)[1]
    for ours, expected in zip(found, pull(d_out.astype(jnp.float32)), strict=True):
        assert ours.dtype == dtype
        error = jnp.linalg.norm(ours.astype(jnp.float32) - expected)
        assert error < bound * jnp.linalg.norm(expected)  # a rounding of bfloat16: 4e-3


@pytest.mark.parametrize("offset", [0, 3, 5])
def test_queries_after_a_cache_see_what_lies_before_them(offset):
    q, k, v = case(queries=3)
    # What lies in the cache beyond the queries must not matter.
    k[:, offset + 3 :], v[:, offset + 3 :] = 1e3, 1e6
    keys, values = (
        jnp.asarray(x.swapaxes(1, 2).reshape(-1, *x.shape[1::2])) for x in (k, v)
    )
    found = attend_cached(jnp.asarray(q), keys, values, jnp.full(len(q), offset))
    expected = by_hand(q, k, v, offset=offset)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_scores_of_any_size_stay_finite():
    q, k, v = (jnp.asarray(x) for x in case())
    found = attend(1e4 * q, 1e4 * k, v, CPU)
    gradient = jax.grad(lambda x: attend(x, 1e4 * k, v, CPU).sum())(1e4 * q)
    assert np.isfinite(found).all()
    assert np.isfinite(gradient).all()


def test_bfloat16_scores_are_summed_in_float32():
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in case()]
    blocks = str(jax.make_jaxpr(lambda *x: attend_to(x, CPU))(*arrays))
    assert blocks.count("dot_general[") == 2
    assert blocks.count("preferred_element_type=float32") == 2
    jaxpr = jax.make_jaxpr(lambda *x: attend_to(x, GPU))(*arrays)
    scores, _ = (e for e in jaxpr.eqns if e.primitive.name == "dot_general")
    assert str(scores.outvars[0].aval.dtype) == "float32"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("dtype", "segment_ids", "message"),
    [
        (jnp.bfloat16, jnp.asarray(SEGMENTS), "needs max_segments"),
        (jnp.float32, None, "needs compute.dtype bfloat16"),
    ],
)
def test_cudnn_refuses_what_it_would_compute_wrongly(dtype, segment_ids, message):
    arrays = [jnp.asarray(x, dtype) for x in case()]
    with pytest.raises(UsageError, match=message):
        attend_to(arrays, Compute(attention="cudnn"), segment_ids=segment_ids)


def test_rows_of_odd_length_are_made_even_for_cudnn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As its rule does, the stand-in takes even lengths only."""
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in case(queries=7, keys=7))

    def dense(q: Any, k: Any, v: Any, **_: Any) -> Any:
        assert q.shape[1] == k.shape[1] == v.shape[1] == 8
        return attend(q, k, v, GPU)

    def packed(q: Any, k: Any, v: Any, *, q_seqlen: Any, **_: Any) -> Any:
        assert np.asarray(q_seqlen).clip(0).sum(axis=1).tolist() == [8, 8]
        return attend(q, k, v, GPU)

    monkeypatch.setattr(jax.nn, "dot_product_attention", dense)
    cudnn = Compute(attention="cudnn", dtype=jnp.bfloat16, max_segments=3)
    np.testing.assert_array_equal(attend(q, k, v, cudnn), attend(q, k, v, GPU))
    segments = jnp.asarray([[1, 1, 1, 1, 2, 2, 2], [1, 1, 2, 3, 3, 0, 0]])
    module = "jax._src.cudnn.fused_attention_stablehlo.dot_product_attention"
    monkeypatch.setattr(module, packed)
    found = attend(q, k, v, cudnn, segment_ids=segments)
    assert found.shape == q.shape
