"""Placement of experts: the published example to the slot, and what holds for any loads."""

import numpy as np
import pytest

from dsv3_jax.parallel import placement

LOADS = np.array([
  [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
  [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
])  # fmt: skip


def test_the_published_example_is_met_slot_by_slot():
  placed = placement.place(LOADS, slots=16, groups=4, nodes=2, devices=8)
  assert placed.hierarchical
  assert placed.expert_YS.tolist() == [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
  ]


def test_without_ties_a_naive_loop_over_one_node_finds_the_same_devices():
  load_E = np.random.default_rng(0).permutation(12) ** 2 + 1.0
  placed = placement.place(load_E[None], slots=16, groups=1, nodes=1, devices=4)
  copies = {e: 1 for e in range(12)}
  for _ in range(4):
    copies[max(copies, key=lambda e: load_E[e] / copies[e])] += 1
  assert placed.copies_YE[0].tolist() == list(copies.values())
  devices = [[] for _ in range(4)]
  parts = [(load_E[e] / n, e) for e, n in copies.items() for _ in range(n)]
  for load, e in sorted(parts, key=lambda part: -part[0]):
    open_ = [d for d in devices if len(d) < 4]
    min(open_, key=lambda d: sum(part[0] for part in d)).append((load, e))
  found = placed.expert_YS.reshape(4, 4)
  assert [sorted(row) for row in found.tolist()] == [sorted(e for _, e in d) for d in devices]


@pytest.mark.parametrize(('groups', 'nodes'), [(8, 4), (8, 8), (4, 8), (1, 1)])
def test_every_copy_has_its_slot_and_groups_stay_whole_where_nodes_share_them_out(groups, nodes):
  load_YE = np.random.default_rng(1).exponential(size=(3, 64)) ** 2
  placed = placement.place(load_YE, slots=96, groups=groups, nodes=nodes, devices=16)
  assert placed.hierarchical == (groups % nodes == 0)
  for expert_S, slot_EC, copies_E in zip(
    placed.expert_YS, placed.slot_YEC, placed.copies_YE, strict=True
  ):
    assert np.bincount(expert_S, minlength=64).tolist() == copies_E.tolist()
    for e, slot_C in enumerate(slot_EC):
      held = slot_C[: copies_E[e]]
      assert (expert_S[held] == e).all() and (slot_C[copies_E[e] :] == -1).all()
      assert len(set(held.tolist())) == copies_E[e]
    if placed.hierarchical and nodes > 1:
      node_of = {(e // (64 // groups), s // (96 // nodes)) for s, e in enumerate(expert_S)}
      assert len(node_of) == groups  # each group on one node
  np.testing.assert_allclose(placed.device_load(load_YE).sum(1), load_YE.sum(1))
  before = placement.in_order(3, 64, 16).unevenness(load_YE)
  assert (placed.unevenness(load_YE) < before).all()


def test_of_even_loads_the_first_come_first_and_idle_layers_stay_in_order():
  placed = placement.place(np.zeros((1, 8)), slots=8, groups=1, nodes=1, devices=4)
  assert placed.expert_YS.tolist() == [list(range(8))]
  even = placement.place(np.ones((1, 8)), slots=8, groups=1, nodes=1, devices=4)
  assert even.expert_YS.tolist() == [[0, 4, 1, 5, 2, 6, 3, 7]]
  assert placed.unevenness(np.zeros((1, 8))).tolist() == [1.0]


@pytest.mark.parametrize(
  ('changed', 'told'),
  [
    ({'slots': 11}, 'slots = 11: must be at least 12'),
    ({'slots': 18}, 'slots = 18: must be a multiple of devices = 8'),
    ({'nodes': 3}, 'devices = 8: must be a multiple of nodes = 3'),
    ({'groups': 5}, 'groups = 5: must divide 12'),
    ({'nodes': 0}, 'nodes = 0: must be at least 1'),
  ],
)
def test_impossible_sizes_name_the_number(changed, told):
  sizes = {'slots': 16, 'groups': 4, 'nodes': 2, 'devices': 8} | changed
  with pytest.raises(ValueError, match=told):
    placement.place(LOADS, **sizes)
  with pytest.raises(ValueError, match='not negative'):
    placement.place(-LOADS, slots=16, groups=4, nodes=2, devices=8)
