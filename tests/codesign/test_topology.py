"""Networks as graphs: Table 3 of arXiv 2505.09343, and what each kind of graph must be."""

import numpy as np
import pytest

from dsv3_jax.codesign import topology
from dsv3_jax.codesign.topology import TABLE_3, Prices


def _row(t: topology.Topology) -> tuple:
  """As Table 3 prints it; of thousands per endpoint as many digits as stand there."""
  digits = 2 if t.name in ('FT2', 'MPFT') else 1
  cost = t.cost()
  return t.endpoints, t.switches, t.links, f'{cost / 1e3:.0f}', f'{cost / t.endpoints:.{digits}f}'


def test_table_3_is_counted_on_the_graphs_to_every_printed_digit():
  built = topology.build(64)
  for name in ('FT2', 'MPFT', 'FT3'):
    assert _row(built[name]) == TABLE_3[name], name
  # The printed Dragonfly has 511 groups where 513 can be connected.
  assert _row(topology.dragonfly(64, 511)) == TABLE_3['DF']
  assert built['DF'].switches == 513 * 32 > TABLE_3['DF'][1]


def test_the_printed_slim_fly_is_of_a_field_that_does_not_exist():
  counts = topology.slim_fly_counts(28)
  assert (counts.endpoints, counts.switches, counts.links) == TABLE_3['SF'][:3]
  cost = Prices().total(64, counts.endpoints, counts.switches, counts.links)
  assert (f'{cost / 1e3:.0f}', f'{cost / counts.endpoints:.1f}') == TABLE_3['SF'][3:]
  with pytest.raises(ValueError, match=r'q = 28: must be a power of a prime; no field has 28 el'):
    topology.slim_fly(64, 28)
  built = topology.build(64)['SF']
  assert (built.switches, built.endpoints) == (2 * 27**2, 30_618)


@pytest.mark.parametrize('q', [3, 4, 5, 7, 8, 9, 11, 13, 27])
def test_slim_fly_is_regular_and_every_two_switches_are_two_links_apart(q):
  # Fields of primes and of powers of 2 and 3; q = 4 w + d for each d.
  built, counts = topology.slim_fly(99, q), topology.slim_fly_counts(q)
  degree_S = built.ports_S - built.endpoints_S
  assert set(degree_S) == {2 * counts.links // counts.switches}
  assert (built.switches, built.links) == (counts.switches, counts.links)
  assert built.graph_SS.max() == 1 and built.diameter() == 2 and built.components == 1


@pytest.mark.parametrize('q', [4, 7, 8, 9])
def test_the_field_is_one(q):
  plus, times, power = topology._field(q)
  elements = np.arange(q)
  np.testing.assert_array_equal(plus[0], elements)
  np.testing.assert_array_equal(times[1], elements)
  np.testing.assert_array_equal(np.sort(power), elements[1:])
  for table in (plus, times[1:, 1:]):  # every row and column holds each element once
    for lines in (table, table.T):
      assert all(len(set(line)) == len(line) for line in lines)
  a, b, c = np.meshgrid(elements, elements, elements)
  np.testing.assert_array_equal(times[a, plus[b, c]], plus[times[a, b], times[a, c]])
  np.testing.assert_array_equal(times[a, times[b, c]], times[times[a, b], c])


@pytest.mark.parametrize('radix', [4, 6, 10])
def test_fat_trees_use_every_port_and_are_as_wide_above_as_below(radix):
  two, three = topology.fat_tree_2(radix), topology.fat_tree_3(radix)
  assert set(two.ports_S) == set(three.ports_S) == {radix}
  assert (two.endpoints, two.switches) == (radix**2 // 2, 3 * radix // 2)
  assert (three.endpoints, three.switches) == (radix**3 // 4, 5 * radix**2 // 4)
  assert (two.diameter(), three.diameter()) == (2, 4)
  assert two.links == two.endpoints and three.links == 2 * three.endpoints
  # Two pods meet in every core: as many shortest paths as there are cores.
  paths = np.linalg.matrix_power(three.graph_SS.toarray(), 4)
  far = np.flatnonzero(three.hops(np.array([0]))[0] == 4)
  assert set(paths[0, far[three.endpoints_S[far] > 0]]) == {radix**2 // 4}


def test_planes_are_fat_trees_that_nothing_connects():
  planes = topology.multi_plane(8, 3)
  assert planes.components == 3 and planes.endpoints == 3 * topology.fat_tree_2(8).endpoints
  assert topology.multi_plane(8, 1).components == 1


@pytest.mark.parametrize(('radix', 'groups'), [(3, None), (7, None), (11, 19), (11, 17), (11, 16)])
def test_dragonfly_uses_every_port_and_three_links_reach_everywhere(radix, groups):
  built = topology.dragonfly(radix, groups)
  h = (radix + 1) // 4
  assert set(built.ports_S) == {radix}
  assert built.diameter() <= 3 and built.components == 1
  assert built.graph_SS[: 2 * h, : 2 * h].sum() == 2 * h * (2 * h - 1)
  assert groups or built.switches == 2 * h * (2 * h * h + 1)


@pytest.mark.parametrize(
  ('make', 'told'),
  [
    (lambda: topology.fat_tree_2(63), 'radix = 63: a fat tree needs an even number of ports'),
    (lambda: topology.fat_tree_3(0), 'radix = 0: a fat tree needs an even number of ports'),
    (lambda: topology.multi_plane(64, 0), 'planes = 0: must be at least 1'),
    (lambda: topology.slim_fly(7), 'radix = 7: the smallest Slim Fly has q = 3 and needs 8 ports'),
    (lambda: topology.slim_fly(64, 29), 'radix = 64: q = 29 needs 65 ports'),
    (lambda: topology.slim_fly(64, 6), 'q = 6: must be 4 w - 1, 4 w or 4 w \\+ 1, and at least 3'),
    (lambda: topology.dragonfly(2), 'radix = 2: a Dragonfly needs at least 3 ports'),
    (lambda: topology.dragonfly(64, 514), 'groups = 514: radix 64 connects 2 to 513'),
  ],
)
def test_a_radix_that_builds_nothing_is_named(make, told):
  with pytest.raises(ValueError, match=told):
    make()


def test_other_radices_and_prices_are_counted_the_same_way():
  small = topology.build(16, planes=4)
  assert small['MPFT'].switches == 4 * 24
  free = Prices(switch=0, fibre=0, short=0, endpoint=1)
  assert {name: t.cost(free) for name, t in small.items()} == {
    name: t.endpoints for name, t in small.items()
  }
