"""Absorbed attention over pages against NumPy in float64, and what must not change a row's bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.kernels.mla_decode import PAGE, entry_size, mla_decode, pack, unpack

_C, _R, _N, _L = 16, 4, 3, 2
_PAGES, _J = 40, 9  # more than one block of pages, and not a multiple of one
_SCALE = 0.3
_POSITIONS = np.array([[0, 1], [62, 63], [63, 64], [511, 512], [256, -1]], np.int32)
_run = jax.jit(mla_decode, static_argnames=('rank', 'scale', 'implementation'))


def _case(seed=0):
  rng = np.random.default_rng(seed)
  q = rng.normal(size=(len(_POSITIONS), _L, _N, _C + _R)).astype(np.float32)
  pages = rng.normal(size=(_PAGES, PAGE, _C + _R)).astype(np.float32)
  table = rng.permutation(_PAGES)[: _J * 4].reshape(4, _J).astype(np.int32)
  return q, pages, np.concatenate([table, table[:1]])  # two rows may share pages


def _numpy(q, pages, table):
  B = len(q)
  out, lse = np.zeros((B, _L, _N, _C)), np.full((B, _L, _N), -np.inf)
  for at in np.ndindex(B, _L, _N):
    b, seen = at[0], _POSITIONS[at[:2]] + 1
    if seen:
      keys = pages[table[b]].reshape(-1, _C + _R)[:seen].astype(np.float64)
      score = keys @ q[at] * _SCALE
      weight = np.exp(score - score.max())
      out[at] = weight @ keys[:, :_C] / weight.sum()
      lse[at] = score.max() + np.log(weight.sum())
  return out, lse


@pytest.mark.parametrize('implementation', ['reference', 'xla'])
def test_output_and_lse_equal_numpy(implementation):
  case = _case()
  got = _run(*case, _POSITIONS, rank=_C, scale=_SCALE, implementation=implementation)
  for x, expected in zip(got, _numpy(*case), strict=True):
    np.testing.assert_allclose(x, expected, rtol=2e-5, atol=2e-6)


def test_a_row_has_the_same_bits_whatever_its_neighbours_and_its_place():
  q, pages, table = _case()
  run = lambda q, table, positions: _run(q, pages, table, positions, rank=_C, scale=_SCALE)
  out, lse = run(q, table, _POSITIONS)
  order = np.array([4, 2, 0, 1, 3])
  moved = run(q[order], table[order], _POSITIONS[order])
  np.testing.assert_array_equal(moved[0], out[order])
  # Alone with short neighbours: the loop ends after one block instead of three.
  short = np.where(np.arange(5)[:, None] == 1, _POSITIONS, 0).astype(np.int32)
  alone = run(q, table, short)
  np.testing.assert_array_equal(alone[0][1], out[1])
  np.testing.assert_array_equal(alone[1][1], lse[1])


@pytest.mark.parametrize('implementation', ['reference', 'xla'])
def test_what_was_left_behind_a_rows_last_position_changes_no_bit(implementation):
  how = {'rank': _C, 'scale': _SCALE, 'implementation': implementation}
  q, pages, table = _case()
  expected, _ = _run(q[:1], pages, table[:1], _POSITIONS[:1], **how)
  pages[table[0, 1:]] = np.nan
  pages[table[0, 0], 2:] = np.nan
  out, _ = _run(q[:1], pages, table[:1], _POSITIONS[:1], **how)
  np.testing.assert_array_equal(out, expected)


def test_an_fp8_entry_of_deepseek_v3_has_656_bytes_and_the_layout_of_flashmla():
  assert entry_size(512, 64, fp8=True) == 656
  rng = np.random.default_rng(0)
  latent = (rng.normal(size=(5, 512)) * 10.0 ** rng.integers(-3, 3, (5, 1))).astype(np.float32)
  k_rope = rng.normal(size=(5, 64)).astype(np.float32)
  entry = np.asarray(pack(jnp.asarray(latent), jnp.asarray(k_rope), jnp.dtype(jnp.uint8)))
  assert entry.shape == (5, 656) and entry.dtype == np.uint8
  scale = np.ascontiguousarray(entry[:, 512:528]).view(np.float32)
  np.testing.assert_allclose(scale, np.abs(latent).reshape(5, 4, 128).max(-1) / 448, rtol=1e-6)
  back = np.asarray(unpack(jnp.asarray(entry), 512, jnp.dtype(jnp.float32)))
  np.testing.assert_allclose(back[:, 512:], k_rope, rtol=2**-8)
  error = np.abs(back[:, :512] - latent).reshape(5, 4, 128)
  assert np.all(
    error <= np.maximum(2.0**-4 * np.abs(latent).reshape(5, 4, 128), scale[..., None] * 2**-10)
  )


def test_attention_reads_fp8_pages():
  q, pages, table = _case()
  packed = pack(jnp.asarray(pages[..., :_C]), jnp.asarray(pages[..., _C:]), jnp.dtype(jnp.uint8))
  same = np.asarray(unpack(packed, _C, jnp.dtype(jnp.float32)))
  out, lse = _run(q, packed, table, _POSITIONS, rank=_C, scale=_SCALE)
  expected = _run(q, same, table, _POSITIONS, rank=_C, scale=_SCALE)
  np.testing.assert_allclose(out, expected[0], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(lse, expected[1], rtol=1e-5)


def test_what_cannot_serve_is_named():
  q, pages, table = _case()
  with pytest.raises(ValueError, match=r"implementation = 'mosaic': must be 'xla' or 'reference'"):
    mla_decode(q, pages, table, _POSITIONS, rank=_C, scale=1.0, implementation='mosaic')
  with pytest.raises(ValueError, match='pages of 32 entries: must be 64'):
    mla_decode(q, pages[:, :32], table, _POSITIONS, rank=_C, scale=1.0)
