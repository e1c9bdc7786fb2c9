"""The step by itself: the distribution of what it draws, its buffers, its weights."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from dsv3_jax import config, mesh
from dsv3_jax.inference import cache as latent_cache
from dsv3_jax.inference import decode, served, step
from dsv3_jax.inference.sampling import Sampling, Samplings
from dsv3_jax.inference.step import Chosen, How, Rows
from dsv3_jax.kernels.mla_decode import PAGE

_VOCAB, _AHEAD, _MANY = 3, 3, 20_480
_BATCH = 1024


def _rows(tokens_BL, start_B, count_B, table_BJ, sampling, sample_B):
  B = len(tokens_BL)
  samplings = Samplings.of([sampling] * B, sample_B)
  return Rows(
    tokens_BL, start_B, count_B, table_BJ, np.full(B, -1, np.int32), samplings, np.array(False)
  )


def _draw(small, drafts, sampling, many):
  """The tokens behind the token 5 of many samples: [many, _AHEAD]; drafts accepted in each step."""
  decoder = small.decoder
  cache = decoder.empty(_BATCH, drafts=drafts)
  how = How(prompt=False, drafts=drafts, vocab_size=_VOCAB)
  table_BJ = np.arange(_BATCH, dtype=np.int32)[:, None]
  found, steps, given = [], 0, 0
  for first in range(0, many, _BATCH):
    sample_B = np.arange(first, first + _BATCH)
    tokens = [[5] for _ in range(_BATCH)]
    guessed_BK = np.zeros((_BATCH, 0), np.int32)
    while min(map(len, tokens)) <= _AHEAD:
      start_B = np.array([len(t) - 1 for t in tokens], np.int32)
      tokens_BL = np.zeros((_BATCH, 1 + drafts), np.int32)
      tokens_BL[:, 0] = [t[-1] for t in tokens]
      tokens_BL[:, 1 : 1 + guessed_BK.shape[1]] = guessed_BK
      count_B = np.full(_BATCH, 1 + guessed_BK.shape[1], np.int32)
      rows = _rows(tokens_BL, start_B, count_B, table_BJ, sampling, sample_B)
      chosen, cache = decoder.step(how, rows, cache)
      chosen = jax.device_get(chosen)
      for t, new, right in zip(tokens, chosen.tokens_BL, chosen.accepted_B, strict=True):
        t += new[: right + 1].tolist()
      guessed_BK = chosen.drafts_BK
      steps, given = steps + _BATCH, given + int(chosen.accepted_B.sum())
    found += [t[1 : 1 + _AHEAD] for t in tokens]
  return np.array(found), given / steps


def test_20_000_draws_by_speculation_follow_the_models_distribution_and_are_those_without(v3):
  sampling = Sampling(temperature=6.0, top_p=1.0, seed=11)  # far from uniform, and from certain
  drawn, accepted = _draw(v3, 2, sampling, _MANY)
  plain, none = _draw(v3, 0, sampling, 4 * _BATCH)
  np.testing.assert_array_equal(drawn[: len(plain)], plain)
  assert accepted > 0.3 and none == 0
  # The joint distribution of three tokens, from forwards over whole sequences.
  cells = list(itertools.product(range(_VOCAB), repeat=_AHEAD))
  whole = np.array([[5, *cell] for cell in cells], np.int32)
  logits = v3.expanded(whole)[:, :-1, :_VOCAB].astype(np.float64) / sampling.temperature
  prob = np.exp(logits) / np.exp(logits).sum(2, keepdims=True)
  chosen = np.take_along_axis(prob, np.array(cells)[:, :, None], 2)[:, :, 0].prod(1)
  assert abs(chosen.sum() - 1) < 1e-6 and chosen.min() * _MANY > 5 and chosen.max() < 0.5
  counts = np.bincount(drawn @ _VOCAB ** np.arange(_AHEAD)[::-1], minlength=len(cells))
  chi = ((counts - chosen * _MANY) ** 2 / (chosen * _MANY)).sum()
  assert chi < 45.64, f'chi-square {chi:.1f} of 26 degrees, 1 % limit 45.64'


def test_weights_cast_once_give_the_bits_of_weights_cast_at_each_use(make_small):
  small = make_small('v3', precision='bf16')
  c, how = small.config.model, How(prompt=True, drafts=1, vocab_size=512)
  tokens_BL = np.random.default_rng(0).integers(0, 512, (1, PAGE), np.int32)
  ones, table = np.ones(1, np.int32), np.zeros((1, 1), np.int32)
  rows = _rows(tokens_BL, 0 * ones, 40 * ones, table, Sampling(0.0, 1.0), [0])
  by_row, cached = P(mesh.TOKENS), latent_cache.Cache(latent_cache.SPEC)
  run = jax.shard_map(
    lambda model, *args: step.step(c, how, model, small.decoder._slots, *args),
    mesh=small.device_mesh,
    in_specs=(P(), jax.tree.map(lambda x: by_row if x.ndim else P(), rows), cached),
    out_specs=(Chosen(*[by_row] * 6, P()), cached),
  )
  # Else XLA leaves out the rounding of a weight that it would widen again for its matmul.
  run = jax.jit(run, compiler_options={'xla_allow_excess_precision': False})
  empty = latent_cache.empty(c, 4, 2)
  cast, uncast = (
    run(lay_out(c, small.model), rows, empty) for lay_out in (decode.prepare, served.lay_out)
  )
  for x, y in zip(jax.tree.leaves(cast), jax.tree.leaves(uncast), strict=True):
    np.testing.assert_array_equal(x, y)


def test_cache_of_deepseek_v3_takes_70272_bytes_per_token_40016_in_fp8():
  for fp8, expected in ((False, 70_272), (True, 61 * 656)):
    cache = latent_cache.empty(config.Model(), 61, 3, fp8=fp8)
    assert cache.entries_YPMX.nbytes == 3 * PAGE * expected
    assert cache.bytes_per_token == expected


def test_a_step_takes_over_the_buffer_of_the_cache_and_writes_its_own_positions(v3):
  old = v3.decoder.empty(3)
  at = old.entries_YPMX.unsafe_buffer_pointer()
  two = np.array([3, 0], np.int32)
  rows = _rows(
    np.zeros((2, 1), np.int32), two, np.array([1, 0], np.int32), np.array([[2], [1]], np.int32),
    Sampling(0.0, 1.0), [0, 0],
  )  # fmt: skip
  _, new = v3.decoder.step(How(prompt=False, drafts=0, vocab_size=512), rows, old)
  assert old.entries_YPMX.is_deleted()
  assert new.entries_YPMX.unsafe_buffer_pointer() == at
  written = np.argwhere(np.any(np.asarray(new.entries_YPMX) != 0, axis=(0, 3)))
  assert written.tolist() == [[2, 3]]  # an empty row leaves nothing
  assert jnp.isfinite(new.entries_YPMX).all()
