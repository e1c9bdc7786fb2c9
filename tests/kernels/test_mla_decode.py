"""Absorbed attention over pages against NumPy in float64, and what must not change a row's bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.kernels import hopper
from dsv3_jax.kernels.mla_decode import (
  PAGE,
  entry_size,
  mla_decode,
  mosaic_gpu,
  pack,
  pallas_tpu,
  unpack,
)

_C, _R, _N, _L = 16, 4, 3, 2
_PAGES, _J = 40, 9  # more than one block of pages, and not a multiple of one
_SCALE = 0.3
_POSITIONS = np.array([[0, 1], [62, 63], [63, 64], [511, 512], [256, -1]], np.int32)
_run = jax.jit(mla_decode, static_argnames=('rank', 'scale', 'implementation'))
_ANYWHERE = 'reference', 'xla', 'pallas_tpu'


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """Blocks of the kernel for TPU that end amid the heads of a query, and several chunks of pages."""
  monkeypatch.setattr(pallas_tpu, '_ROWS', 4)
  monkeypatch.setattr(pallas_tpu, '_PAGES', 2)


def _case(seed=0):
  rng = np.random.default_rng(seed)
  q = rng.normal(size=(len(_POSITIONS), _L, _N, _C + _R)).astype(np.float32)
  pages = rng.normal(size=(_PAGES, PAGE, _C + _R)).astype(np.float32)
  table = rng.permutation(_PAGES)[: _J * 4].reshape(4, _J).astype(np.int32)
  return q, pages, np.concatenate([table, table[:1]])  # two rows may share pages


def _numpy(q, pages, table, rank=_C, scale=_SCALE):
  B, L, N, X = q.shape
  out, lse = np.zeros((B, L, N, rank)), np.full((B, L, N), -np.inf)
  for at in np.ndindex(B, L, N):
    b, seen = at[0], _POSITIONS[at[:2]] + 1
    if seen:
      keys = pages[table[b]].reshape(-1, X)[:seen].astype(np.float64)
      score = keys @ q[at] * scale
      weight = np.exp(score - score.max())
      out[at] = weight @ keys[:, :rank] / weight.sum()
      lse[at] = score.max() + np.log(weight.sum())
  return out, lse


@pytest.mark.parametrize('implementation', _ANYWHERE)
def test_output_and_lse_equal_numpy(implementation):
  case = _case()
  got = _run(*case, _POSITIONS, rank=_C, scale=_SCALE, implementation=implementation)
  for x, expected in zip(got, _numpy(*case), strict=True):
    np.testing.assert_allclose(x, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize('implementation', ['xla', 'pallas_tpu'])
def test_a_row_has_the_same_bits_whatever_its_neighbours_and_its_place(implementation):
  q, pages, table = _case()
  how = {'rank': _C, 'scale': _SCALE, 'implementation': implementation}
  run = lambda q, table, positions: _run(q, pages, table, positions, **how)
  out, lse = run(q, table, _POSITIONS)
  order = np.array([4, 2, 0, 1, 3])
  moved = run(q[order], table[order], _POSITIONS[order])
  np.testing.assert_array_equal(moved[0], out[order])
  # Alone with short neighbours: the loop ends after one block instead of three.
  short = np.where(np.arange(5)[:, None] == 1, _POSITIONS, 0).astype(np.int32)
  alone = run(q, table, short)
  np.testing.assert_array_equal(alone[0][1], out[1])
  np.testing.assert_array_equal(alone[1][1], lse[1])


@pytest.mark.parametrize('implementation', _ANYWHERE)
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


@pytest.mark.parametrize('implementation', ['xla', 'pallas_tpu'])
def test_attention_reads_fp8_pages(implementation):
  rng = np.random.default_rng(2)
  q = rng.normal(size=(len(_POSITIONS), _L, _N, 256 + 16)).astype(np.float32)
  pages = jnp.asarray(rng.normal(size=(_PAGES, PAGE, 256 + 16)), jnp.float32)
  packed = pack(pages[..., :256], pages[..., 256:], jnp.dtype(jnp.uint8))
  same = np.asarray(unpack(packed, 256, jnp.dtype(jnp.float32)))
  table, how = _case()[2], {'rank': 256, 'scale': 0.1}
  got = _run(q, packed, table, _POSITIONS, **how, implementation=implementation)
  for x, expected in zip(got, _numpy(q, same, table, **how), strict=True):
    np.testing.assert_allclose(x, expected, rtol=2e-5, atol=2e-6)


def test_what_cannot_serve_is_named():
  q, pages, table = _case()
  with pytest.raises(
    ValueError, match=r"'mosaic' cannot serve: there is none .*'reference', 'xla'"
  ):
    mla_decode(q, pages, table, _POSITIONS, rank=_C, scale=1.0, implementation='mosaic')
  with pytest.raises(ValueError, match='pages of 32 entries: must be 64'):
    mla_decode(q, pages[:, :32], table, _POSITIONS, rank=_C, scale=1.0)
  with pytest.raises(ValueError, match='entries must have 20 for queries of 20'):
    mla_decode(q, pages[..., :18], table, _POSITIONS, rank=_C, scale=1.0)
  with pytest.raises(ValueError, match=r'must be of 5 rows of 2 queries'):
    mla_decode(q, pages, table, _POSITIONS[:, :1], rank=_C, scale=1.0)
  packed = pack(jnp.asarray(pages[..., :_C]), jnp.asarray(pages[..., _C:]), jnp.dtype(jnp.uint8))
  with pytest.raises(ValueError, match=r"'pallas_tpu' cannot serve: FP8 latents of 16 .*'xla' can"):
    mla_decode(q, packed, table, _POSITIONS, rank=_C, scale=1.0, implementation='pallas_tpu')
  with pytest.raises(
    ValueError, match="'mosaic_gpu' cannot serve: queries are float32, the kernel"
  ):
    mla_decode(q, pages, table, _POSITIONS, rank=_C, scale=1.0, implementation='mosaic_gpu')
  with pytest.raises(
    ValueError, match='pages are bfloat16, queries float32: the kernel reads both'
  ):
    half = jnp.asarray(pages, jnp.bfloat16)
    mla_decode(q, half, table, _POSITIONS, rank=_C, scale=1.0, implementation='pallas_tpu')
  q, pages = (jnp.asarray(x, jnp.bfloat16) for x in (q, pages))
  with pytest.raises(
    ValueError, match=r'entries have 16 \+ 4 numbers, the kernel takes a multiple'
  ):
    mla_decode(q, pages, table, _POSITIONS, rank=_C, scale=1.0, implementation='mosaic_gpu')


# ---- the kernel for Hopper, interpreted -------------------------------------------------------------

_WIDE = {'rank': 128, 'scale': 0.1}


def _wide_case():
  """As `_case` in BF16, of 2 queries x 48 heads: 32 rows of the second block of 64 are padding."""
  rng = np.random.default_rng(1)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
  return draw(len(_POSITIONS), _L, 48, 192), draw(_PAGES, PAGE, 192), _case()[2]


def _on_hopper(*case):
  with hopper.interpreted():
    got = mla_decode(*case, **_WIDE, implementation='mosaic_gpu')
  return [np.asarray(x, np.float64) for x in got]


needs_interpreter = pytest.mark.skipif(
  not hopper.AVAILABLE, reason='the interpreter of jax 0.10 cannot load what the kernel needs'
)


@needs_interpreter
@pytest.mark.parametrize('parts', [1, 3])
def test_on_hopper_output_and_lse_equal_numpy_whatever_pages_hold_behind_the_end(
  parts, monkeypatch
):
  monkeypatch.setattr(mosaic_gpu, '_parts', lambda *_: parts)
  q, pages, table = _wide_case()
  expected = _numpy(*(np.asarray(x, np.float64) for x in (q, pages)), table, **_WIDE)
  own = [pages[jnp.asarray(row)].reshape(-1, 192) for row in table]
  behind = lambda x, last: x.at[last + 1 :].set(jnp.nan).reshape(-1, PAGE, 192)
  own = [behind(x, last) for x, last in zip(own, _POSITIONS.max(axis=1), strict=True)]
  own_table = np.arange(len(own) * _J, dtype=np.int32).reshape(-1, _J)
  out, lse = _on_hopper(q, jnp.concatenate(own), own_table, _POSITIONS)
  seen = np.isfinite(expected[1])
  np.testing.assert_array_equal(np.isfinite(lse), seen)
  np.testing.assert_allclose(lse[seen], expected[1][seen], rtol=1e-5, atol=1e-6)
  assert np.linalg.norm(out - expected[0]) < 4e-3 * np.linalg.norm(expected[0])
  assert not out[~seen].any()


@needs_interpreter
@pytest.mark.parametrize('parts', [1, 3])
def test_on_hopper_a_row_has_the_same_bits_whatever_its_neighbours_and_its_place(
  parts, monkeypatch
):
  monkeypatch.setattr(mosaic_gpu, '_parts', lambda *_: parts)
  q, pages, table = _wide_case()
  out, lse = _on_hopper(q, pages, table, _POSITIONS)
  order = np.array([4, 2, 0, 1, 3])
  short = np.where(order[:, None] == 3, _POSITIONS[order], 0).astype(np.int32)
  moved = _on_hopper(q[order], pages, table[order], short)
  np.testing.assert_array_equal(moved[0][4], out[3])
  np.testing.assert_array_equal(moved[1][4], lse[3])


def test_on_hopper_pages_are_split_where_rows_are_too_few_for_the_card(monkeypatch):
  monkeypatch.setattr(hopper, 'blocks', lambda: 132)
  assert mosaic_gpu._parts(256, 512) == 1
  assert mosaic_gpu._parts(2, 512) == 66
  assert mosaic_gpu._parts(2, 20) == 5
  assert mosaic_gpu._parts(2, 3) == 1
