"""Made-up routing: what a router could choose, as uneven as its name says, and what it costs to send."""

import collections

import numpy as np
import pytest

from dsv3_jax import config
from dsv3_jax.parallel import skews

_V3 = config.Moe(num_experts=64, top_k=8, num_groups=8, top_groups=4)
_PLAIN = config.Moe(num_experts=64, top_k=1, num_groups=1, top_groups=1)


@pytest.mark.parametrize('name', skews.NAMES)
@pytest.mark.parametrize(
  'sizes', [(64, 8, 8, 4), (64, 8, 8, 1), (64, 8, 1, 1), (16, 3, 8, 2), (8, 8, 4, 4)], ids=str
)
def test_a_token_s_experts_differ_and_lie_in_few_groups(name, sizes):
  E, K, G, M = sizes
  c = config.Moe(num_experts=E, top_k=K, num_groups=G, top_groups=M)
  ids = skews.make(name, c, 4, 300)
  assert ids.shape == (4, 300, K) and ids.dtype == np.int32
  for ids_K in ids.reshape(-1, K):
    assert len(set(ids_K)) == K and ids_K.min() >= 0 and ids_K.max() < E
    assert len(set(ids_K // (E // G))) <= M


def _shares(ids: np.ndarray) -> np.ndarray:
  return np.bincount(ids.ravel(), minlength=64) / ids.size


def test_uniform_loads_all_experts_alike():
  for c in (_V3, _PLAIN):
    np.testing.assert_allclose(64 * _shares(skews.make('uniform', c, 8, 20_000)), 1, atol=0.1)


@pytest.mark.parametrize('groups', [(1, 1), (8, 1)])
def test_zipf_shares_fall_as_one_over_the_rank(groups):
  c = config.Moe(num_experts=64, top_k=1, num_groups=groups[0], top_groups=groups[1])
  share_E = np.sort(_shares(skews.make('zipf', c, 8, 100_000)))[::-1]
  rank_E = np.arange(1, 65)
  slope = np.polyfit(np.log(rank_E), np.log(share_E), 1)[0]
  assert slope == pytest.approx(-1, abs=0.02)
  np.testing.assert_allclose(share_E * rank_E * (1 / rank_E).sum(), 1, atol=0.1)


def test_zipf_of_several_experts_under_the_limit_is_uneven_too():
  load = skews.describe(skews.make('zipf', _V3, 8, 2000), 64, 2, 4)['expert_load']
  assert 2.5 < load < 8  # at 8 each token has the same expert


def test_popular_experts_lie_anywhere():
  firsts = {int(np.argmax(_shares(skews.make('zipf', _PLAIN, 1, 2000, seed)))) for seed in range(8)}
  assert len(firsts) > 4


def test_one_hot_sends_every_token_to_the_same_experts():
  ids = skews.make('one_hot', _V3, 4, 100)
  assert (ids == np.arange(8)).all()
  told = skews.describe(ids, 64, 2, 4)
  assert told == {
    'expert_load': 8,
    'device_load': 8,
    'node_load': 2,
    'nodes_per_token': 1,
    'devices_per_token': 1,
  }


def test_in_sequences_each_device_has_favourites_of_its_own():
  ids = skews.make('sequence', _PLAIN, 8, 5000)
  favourites = [int(np.argmax(_shares(ids_TK))) for ids_TK in ids]
  assert len(set(favourites)) > 5
  most = lambda ids: 64 * _shares(ids).max()
  assert max(most(ids_TK) for ids_TK in ids) > 3 * most(ids)


def test_the_same_seed_gives_the_same_choices_and_another_one_others():
  for name in ('uniform', 'zipf', 'sequence'):
    one = skews.make(name, _V3, 2, 50)
    np.testing.assert_array_equal(one, skews.make(name, _V3, 2, 50))
    assert np.any(one != skews.make(name, _V3, 2, 50, seed=1))


def test_an_unknown_skew_is_named():
  with pytest.raises(
    ValueError, match="skew 'zip': must be one of uniform, zipf, one_hot, sequence"
  ):
    skews.make('zip', _V3, 2, 50)


# ---- costs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(('node', 'local'), [(2, 4), (4, 2), (1, 8), (8, 1)])
def test_needed_rows_are_those_of_a_count_by_hand(node, local):
  n, here = node * local, 64 // (node * local)
  ids = skews.make('zipf', _V3, n, 40)
  flat, two_hop = collections.Counter(), collections.Counter()
  for sender, ids_TK in enumerate(ids):
    for ids_K in ids_TK:
      to = {int(i) // here for i in ids_K}
      for device in to - {sender}:
        flat['local' if device // local == sender // local else 'node'] += 1
      for reached in {device // local for device in to}:
        two_hop['node'] += reached != sender // local
        forwarder = reached * local + sender % local
        two_hop['local'] += len({d for d in to if d // local == reached} - {forwarder})
  for form, expected in (('flat', flat), ('two_hop', two_hop)):
    rows = skews.useful_rows(form, ids, 64, node, local)
    assert rows == {axis: expected[axis] / n for axis in ('node', 'local')}


def test_nodes_and_devices_of_a_token_are_those_of_a_count_by_hand():
  ids = skews.make('uniform', _V3, 8, 100)
  told = skews.describe(ids, 64, 2, 4)
  tokens = ids.reshape(-1, 8)
  assert told['devices_per_token'] == np.mean([len(set(ids_K // 8)) for ids_K in tokens])
  assert told['nodes_per_token'] == np.mean([len(set(ids_K // 32)) for ids_K in tokens])
  counts = np.bincount(ids.ravel(), minlength=64)
  assert told['expert_load'] == counts.max() / counts.mean()
  assert told['device_load'] == counts.reshape(8, 8).sum(1).max() / counts.sum() * 8
