"""Prefill and absorbed decode over the latent cache against the expanded forward of training."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dsv3_jax import config, mesh
from dsv3_jax.inference import cache as latent_cache
from dsv3_jax.inference import decode

_LENGTHS = np.array([16, 1, 7, 12], np.int32)  # prompts, in rows of 16
_TOKENS = np.random.default_rng(0).integers(0, 512, (4, 24), np.int32)


def _assert_close(actual, expected) -> None:
  """Within 1e-5 of the largest logit."""
  error = np.max(np.abs(np.asarray(actual) - expected)) / np.max(np.abs(expected))
  assert error < 1e-5, f'relative error {error:.1e}'


def _prefill(small, tokens_BL=_TOKENS[:, :16], lengths_B=_LENGTHS):
  return small.decoder.prefill(tokens_BL, lengths_B, small.decoder.empty(len(tokens_BL), 32))


def _decode_one_by_one(small, cache, position_B, steps):
  """Logits [B, steps, V] of _TOKENS from each row's position on."""
  logits = []
  for step in range(steps):
    at_B1 = (position_B + step)[:, None]
    out_B1V, cache = small.decoder.decode(np.take_along_axis(_TOKENS, at_B1, 1), at_B1, cache)
    logits.append(np.asarray(out_B1V)[:, 0])
  return np.stack(logits, 1)


def _from(x_BLV, position_B, steps):
  """Entries position .. position + steps - 1 of each row."""
  return np.take_along_axis(x_BLV, (position_B[:, None] + np.arange(steps))[:, :, None], 1)


def test_prefill_and_absorbed_decode_give_the_logits_of_the_expanded_forward(each_small):
  expected_BLV = each_small.expanded(_TOKENS)
  assert np.std(expected_BLV) > 0.1
  logits_BV, cache = _prefill(each_small)
  _assert_close(logits_BV, _from(expected_BLV, _LENGTHS - 1, 1)[:, 0])
  decoded_BLV = _decode_one_by_one(each_small, cache, _LENGTHS, 8)
  _assert_close(decoded_BLV, _from(expected_BLV, _LENGTHS, 8))


def test_decode_from_an_empty_cache_gives_the_logits_of_the_expanded_forward(each_small):
  start_B = np.zeros(4, np.int32)
  decoded_BLV = _decode_one_by_one(each_small, each_small.decoder.empty(4, 32), start_B, 24)
  _assert_close(decoded_BLV, each_small.expanded(_TOKENS))


def test_decode_of_several_positions_at_once_equals_one_by_one(v3):
  at_BL = _LENGTHS[:, None] + np.arange(4, dtype=np.int32)
  together_BLV, cache = v3.decoder.decode(
    np.take_along_axis(_TOKENS, at_BL, 1), at_BL, _prefill(v3)[1]
  )
  one_by_one_BLV = _decode_one_by_one(v3, _prefill(v3)[1], _LENGTHS, 4)
  _assert_close(together_BLV, one_by_one_BLV)
  # What they left in the cache serves the next token alike.
  next_BLV = _decode_one_by_one(v3, cache, _LENGTHS + 4, 1)
  _assert_close(next_BLV, _from(v3.expanded(_TOKENS), _LENGTHS + 4, 1))


def test_what_pads_a_prompt_changes_no_bit(v3):
  padded_BL = np.where(np.arange(16) < _LENGTHS[:, None], _TOKENS[:, :16], 511)
  runs = []
  for tokens_BL in (_TOKENS[:, :16], padded_BL.astype(np.int32)):
    logits_BV, cache = _prefill(v3, tokens_BL)
    runs.append([np.asarray(logits_BV), _decode_one_by_one(v3, cache, _LENGTHS, 2)])
  assert not np.array_equal(_TOKENS[:, :16], padded_BL)
  for one, other in zip(*runs, strict=True):
    np.testing.assert_array_equal(one, other)


def test_tokens_beyond_the_end_of_the_cache_leave_it_and_other_rows_alone(v3):
  _, cache = _prefill(v3)
  before = np.asarray(cache.latent_YBMC)
  positions_B1 = np.array([[16], [32], [1000], [12]], np.int32)
  _, cache = v3.decoder.decode(_TOKENS[:, :1], positions_B1, cache)
  changed_BM = np.any(np.asarray(cache.latent_YBMC) != before, axis=(0, 3))
  assert np.argwhere(changed_BM).tolist() == [[0, 16], [3, 12]]


@pytest.mark.parametrize('zero', [0, 1])
def test_a_mesh_gives_the_logits_of_one_device(v3, make_small, zero):
  spread = make_small('v3', config.Mesh(data=2, local=2, zero=zero))
  assert spread.model.head_DV[...].is_fully_replicated == (zero == 0)
  logits_BV, cache = _prefill(spread)
  expected_BV, expected_cache = _prefill(v3)
  _assert_close(logits_BV, np.asarray(expected_BV))
  decoded_BLV = _decode_one_by_one(spread, cache, _LENGTHS, 2)
  _assert_close(decoded_BLV, _decode_one_by_one(v3, expected_cache, _LENGTHS, 2))


def test_weights_cast_once_give_the_bits_of_weights_cast_at_each_use(make_small):
  small = make_small('v3', precision='bf16')
  c = small.config.model
  specs = jax.tree.map(lambda _: P(), small.model)
  rows = P(mesh.TOKENS)
  uncast = jax.shard_map(
    lambda *args: decode.prefill(c, *args),
    mesh=small.device_mesh,
    in_specs=(specs, rows, rows, latent_cache.SPEC),
    out_specs=(rows, latent_cache.SPEC),
  )
  empty = latent_cache.empty(c, 4, 32)
  expected_BV, expected_cache = jax.jit(uncast)(small.model, _TOKENS[:, :16], _LENGTHS, empty)
  logits_BV, cache = _prefill(small)
  np.testing.assert_array_equal(logits_BV, expected_BV)
  for buffer, expected in zip(jax.tree.leaves(cache), jax.tree.leaves(expected_cache), strict=True):
    np.testing.assert_array_equal(buffer, expected)


def test_cache_keeps_the_latent_and_one_rotary_key_per_token_and_layer(v3):
  m = v3.config.model
  cache = v3.decoder.empty(2, 8)
  values = sum(buffer.size for buffer in jax.tree.leaves(cache))
  assert values == m.num_layers * 2 * 8 * (m.mla.kv_rank + m.mla.rope_dim)
  assert cache.bytes_per_token == sum(b.nbytes for b in jax.tree.leaves(cache)) / (2 * 8)


def test_cache_of_deepseek_v3_takes_70272_bytes_per_token():
  cache = jax.eval_shape(lambda: latent_cache.empty(config.Model(), 3, 4096))
  assert cache.bytes_per_token == 70_272
  total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
  assert total == 3 * 4096 * 70_272


def test_decode_takes_over_the_buffers_of_the_cache_it_is_given(v3):
  old = v3.decoder.empty(4, 32)
  at = old.latent_YBMC.unsafe_buffer_pointer()
  _, new = v3.decoder.decode(_TOKENS[:, :1], np.zeros((4, 1), np.int32), old)
  assert old.latent_YBMC.is_deleted()
  assert new.latent_YBMC.unsafe_buffer_pointer() == at
