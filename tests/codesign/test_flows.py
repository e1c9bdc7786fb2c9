"""Flows on fabrics: fair rates against arithmetic, and Figures 5 to 8 of arXiv 2505.09343."""

import dataclasses

import numpy as np
import pytest
from scipy import sparse

from dsv3_jax import config
from dsv3_jax.codesign import fabric, flows

RATES = {'nic': 50e9, 'nvlink': 160e9}
MPFT = fabric.mpft(64, 8, **RATES)
MRFT = fabric.mrft(64, 8, **RATES)


# ---- rates ---------------------------------------------------------------------------------------


def test_rates_are_max_min_fair():
  # Bertsekas and Gallager's line: one flow over every link, one more on some of them.
  use_XF = sparse.csr_array(np.array([[1, 1, 0, 0], [1, 0, 1, 1], [0, 0, 0, 1]], float))
  rate_F = flows.fair_rates(use_XF, np.array([1.0, 0.6, 1.0]))
  np.testing.assert_allclose(rate_F, [0.2, 0.8, 0.2, 0.2])
  twice_XF = sparse.csr_array(np.array([[2.0, 1.0]]))  # the first counts double on the link
  np.testing.assert_allclose(flows.fair_rates(twice_XF, np.array([3.0])), [1, 1])


@pytest.mark.parametrize('seed', range(5))
def test_in_fair_rates_every_flow_has_a_full_link_on_which_none_is_faster(seed):
  rng = np.random.default_rng(seed)
  dense_XF = (rng.random((12, 40)) < 0.2).astype(float)
  dense_XF[0, dense_XF.sum(0) == 0] = 1
  capacity_X = rng.uniform(1, 5, 12)
  rate_F = flows.fair_rates(sparse.csr_array(dense_XF), capacity_X)
  load_X = dense_XF @ rate_F
  assert (load_X <= capacity_X * (1 + 1e-9)).all()
  full_X = load_X >= capacity_X * (1 - 1e-6)
  for f, rate in enumerate(rate_F):
    bottleneck = full_X & (dense_XF[:, f] > 0)
    fastest_X = (dense_XF * rate_F).max(1)
    assert (fastest_X[bottleneck] <= rate * (1 + 1e-6)).any()


def test_what_a_flow_leaves_behind_the_others_use():
  use_XF = sparse.csr_array(np.ones((1, 3)))
  end_F = flows.finish(use_XF, np.array([3.0]), np.array([1.0, 2.0, 0.0]))
  np.testing.assert_allclose(end_F, [2 / 3, 1, 0])


# ---- routes --------------------------------------------------------------------------------------


def _links(f: fabric.Fabric, src, dst, routing='adaptive', forward=True, seed=0) -> dict:
  """{(kind, ends): share} of one transfer."""
  use = fabric.Use(f, 1)
  rng = np.random.default_rng(seed)
  use.add_transfer(np.array([0]), np.array([src]), np.array([dst]), routing, rng, forward)
  column = use.matrix_XF.toarray()[:, 0]
  size = f.switch_NP.size
  kinds = ('out', 'in', 'nvlink out', 'nvlink in')
  name = lambda x: (
    (kinds[x // size], *divmod(x % size, f.planes))
    if x < 4 * size
    else ('switch', *(int(s[0]) for s in np.nonzero(f.edge_SS == x)))
  )
  return {name(int(x)): float(column[x]) for x in np.flatnonzero(column)}


def test_another_plane_is_reached_through_the_gpu_that_has_it():
  leaf = {('out', 0, 5): 1, ('in', 1, 5): 1}
  pxn = {('nvlink out', 0, 2): 1, ('nvlink in', 0, 5): 1} | leaf
  assert _links(MPFT, (0, 2), (1, 5)) == _links(MRFT, (0, 2), (1, 5)) == pxn
  assert _links(MPFT, (0, 5), (1, 5)) == leaf
  # Rails meet in the spines, planes nowhere: without forwarding the one crosses, the other still forwards.
  assert _links(MPFT, (0, 2), (1, 5), forward=False) == pxn
  direct = _links(MRFT, (0, 2), (1, 5), 'ecmp', forward=False)
  assert direct.keys() >= {('out', 0, 2), ('in', 1, 5)} and len(direct) == 4


def test_adaptive_spreads_over_all_spines_static_goes_by_destination_and_ecmp_by_chance():
  far = MPFT.leaf_nodes(64, 2)[32:]
  spread = _links(MPFT, (0, 0), (far[3], 0))
  assert sorted(v for (kind, *_), v in spread.items() if kind == 'switch') == [1 / 32] * 64
  spine = lambda *args: next(
    b for kind, _, b in _links(MPFT, *args) if kind == 'switch' and b >= 64
  )
  static = [spine((0, 0), (node, 0), 'static') for node in far]
  assert len(set(static)) == 32
  drawn = {spine((0, 0), (far[0], 0), 'ecmp', True, seed) for seed in range(40)}
  assert 15 < len(drawn) < 32


def test_every_byte_that_leaves_a_gpu_arrives():
  broken = MPFT.without_nic(1, 3).without_plane(6)
  nodes = MPFT.leaf_nodes(6, 3)
  for routing in fabric.ROUTING:
    use = fabric.Use(broken, 1)
    src = np.array([(nodes[0], p) for p in range(8)])
    dst = np.array([(nodes[5], 7 - p) for p in range(8)])
    use.add_transfer(np.zeros(8, int), src, dst, routing, np.random.default_rng(0))
    column = use.matrix_XF.toarray()[:, 0]
    size = broken.switch_NP.size
    out, into, up, down = column[: 4 * size].reshape(4, size).sum(1)
    np.testing.assert_allclose([out, into, up - down], [8, 8, 0])
    np.testing.assert_allclose(column[4 * size :].sum(), 16)  # leaf to spine to leaf


# ---- Figures 5 and 6 -----------------------------------------------------------------------------


@pytest.mark.parametrize('gpus', [16, 32, 64, 128])
def test_all_to_all_is_as_fast_on_planes_as_on_rails(gpus):
  for leaves in (1, 2):
    nodes = [f.leaf_nodes(gpus // 8, leaves) for f in (MPFT, MRFT)]
    planes, rails = (flows.all_to_all(f, n, 1e9) for f, n in zip((MPFT, MRFT), nodes, strict=True))
    assert planes.seconds == pytest.approx(rails.seconds, rel=0.02)
    # A NIC carries what goes to other nodes, and nothing else is full.
    assert planes.seconds == pytest.approx(1e9 * (gpus - 8) / gpus / 50e9, rel=1e-6)


def test_without_forwarding_rails_load_the_spines():
  nodes = MRFT.leaf_nodes(16)
  forwarded = flows.all_to_all(MRFT, nodes, 1e9)
  crossing = flows.all_to_all(MRFT, nodes, 1e9, forward=False)
  assert forwarded.busiest == 0 and crossing.busiest > 0.3


# ---- Figure 7 ------------------------------------------------------------------------------------

FIGURE_7 = {16: (43.05, 42.47), 32: (58.02, 56.96), 64: (50.58, 48.54), 128: (45.34, 41.6)}


@pytest.mark.parametrize('gpus', FIGURE_7)
def test_dispatch_and_combine_are_within_20_percent_of_deepep(gpus):
  f = dataclasses.replace(MPFT, nic=40e9)  # what small messages reach of 50 (section 4.3)
  nodes = f.leaf_nodes(gpus // 8)
  for printed, row in zip(FIGURE_7[gpus], (7168, 14336), strict=True):
    found = flows.expert_dispatch(f, nodes, config.Moe(), row=row)
    assert found.bandwidth / 1e9 == pytest.approx(printed, rel=0.2)


def test_spread_of_tokens_is_that_of_random_routing():
  moe, nodes = config.Moe(), 8
  rng = np.random.default_rng(0)
  kept = rng.permuted(np.tile(np.arange(nodes), (20_000, 1)), axis=1)[:, :4]
  inside = rng.permuted(np.tile(np.arange(128), (20_000, 1)), axis=1)[:, :8]
  expert = np.take_along_axis(kept, inside // 32, 1) * 32 + inside % 32
  seen = lambda per: np.mean([len(set(row // per)) for row in expert])
  on_node, on_gpu = flows.expected_spread(moe, nodes, 8)
  assert nodes * on_node == pytest.approx(seen(32), rel=0.005)
  assert 8 * nodes * on_gpu == pytest.approx(seen(4), rel=0.005)


# ---- Figure 8 ------------------------------------------------------------------------------------

FIGURE_8 = {8: (45, 57), 4: (83, 103), 2: (97, 190)}  # ECMP, adaptive


@pytest.mark.parametrize('tensor_parallel', FIGURE_8)
def test_ecmp_loses_to_adaptive_routing_what_figure_8_shows(tensor_parallel):
  f = fabric.fat_tree(128, 8, **RATES)
  nodes = f.leaf_nodes(16, 4)
  run = lambda routing, seed=0: (
    flows.all_gather(
      f, nodes, 1e9, tensor_parallel=tensor_parallel, routing=routing, seed=seed
    ).bandwidth
  )
  adaptive = run('adaptive')
  assert adaptive == pytest.approx(50e9 * 8 / tensor_parallel) == run('static')
  ecmp = np.mean([run('ecmp', seed) for seed in range(60)])
  printed = FIGURE_8[tensor_parallel]
  assert ecmp / adaptive == pytest.approx(printed[0] / printed[1], rel=0.25)


# ---- failures ------------------------------------------------------------------------------------


def _slowdown(broken: fabric.Fabric, whole: fabric.Fabric, nodes: np.ndarray) -> float:
  return flows.all_to_all(broken, nodes, 1e9).seconds / flows.all_to_all(whole, nodes, 1e9).seconds


@pytest.mark.parametrize('make', [fabric.mpft, fabric.mrft])
def test_a_lost_plane_leaf_or_link_slows_by_what_is_gone(make):
  whole = make(8, 4, **RATES)
  nodes = whole.leaf_nodes(8, 2)  # both leaves full: 4 NICs up 4 cables
  assert _slowdown(whole.without_plane(2), whole, nodes) == pytest.approx(4 / 3)
  # One leaf is the plane of half of the nodes; their NICs have all of 4/3, and so has the rest of them.
  leaf = whole.switch_NP[nodes[0], 1]
  assert _slowdown(whole.without_switch(leaf), whole, nodes) == pytest.approx(4 / 3)
  assert _slowdown(whole.without_nic(nodes[5], 0), whole, nodes) == pytest.approx(4 / 3)
  # Of 28 GPUs in other nodes 16 are beyond the spines, so 4 cables carry 4/7 and 3 of them 16/21.
  spine = int(np.flatnonzero(whole.graph_SS[leaf])[0])
  assert _slowdown(whole.without_link(leaf, spine), whole, nodes) == 1
  three = whole
  for other in np.flatnonzero(whole.graph_SS[leaf])[:3]:
    three = three.without_link(leaf, int(other))
  assert _slowdown(three, whole, nodes) == pytest.approx(16 / 7, rel=1e-6)


def test_what_nothing_connects_is_named():
  alone = MPFT
  for plane in range(8):
    alone = alone.without_nic(3, plane)
  with pytest.raises(
    ValueError, match='MPFT: no plane is left from GPU 0 of node 0 to GPU 0 of node 3'
  ):
    flows.all_to_all(alone, np.arange(4), 1e9)


@pytest.mark.parametrize(
  ('call', 'told'),
  [
    (lambda: fabric.mrft(64, 7, **RATES), 'rails = 7: must divide the 64 leaves of radix 64'),
    (lambda: fabric.fat_tree(64, 33, **RATES), '33 GPUs a node: a leaf of radix 64 has 32 ports'),
    (lambda: MPFT.leaf_nodes(80, 2), '80 nodes at 2 places: MPFT has 64 places of 32 nodes'),
    (lambda: MPFT.without_link(0, 1), 'switches 0 and 1: there is no link between them'),
    (
      lambda: flows.all_to_all(MPFT, np.arange(2), 1e9, routing='valiant'),
      "routing 'valiant': must be one of adaptive, ecmp, static",
    ),
    (
      lambda: flows.all_gather(MPFT, np.arange(2), 1e9, tensor_parallel=3),
      'tensor_parallel = 3: must divide 8 GPUs of a node',
    ),
    (
      lambda: flows.expert_dispatch(MPFT, np.arange(3), config.Moe()),
      '24 GPUs: must divide model.moe.num_experts = 256',
    ),
  ],
)
def test_what_cannot_be_built_or_sent_is_named(call, told):
  with pytest.raises(ValueError, match=told):
    call()
