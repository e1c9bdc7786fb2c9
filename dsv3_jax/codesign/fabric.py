"""Nodes of GPUs on a network of switches: which links a transfer uses, whole or damaged.

| fabric     | a node's NICs                                  | between GPUs of different index               |
|------------|------------------------------------------------|-----------------------------------------------|
| `mpft`     | each in a network of its own (planes)          | NVLink: planes meet inside nodes alone        |
| `mrft`     | each on a leaf of its own (rails), common spines | NVLink (PXN), or leaf - spine - leaf        |
| `fat_tree` | all on one leaf                                | the leaf, or leaf - spine - leaf              |

A link has one direction. A transfer that crosses nodes goes out of one NIC, over the shortest path between
the two switches, which has at most two links, and into another NIC. Among equally short paths chooses

  'adaptive'  each packet: all paths carry equal shares (packet spraying)
  'ecmp'      a hash: each transfer draws one path, whoever else is on it
  'static'    the destination: port d of its leaf takes path d modulo their number

What is cut is routed around: over the paths and planes that are left, whose NICs are reached by NVLink.
"""

import dataclasses
import functools

import numpy as np
from scipy import sparse

from dsv3_jax.codesign import topology

ROUTING = ('adaptive', 'ecmp', 'static')


@dataclasses.dataclass(frozen=True, eq=False)
class Fabric:
  """N nodes of P GPUs with a NIC each; links are numbered as `capacity_X` lists them."""

  name: str
  switch_NP: np.ndarray  # int: where each NIC is plugged in; -1 where it is cut
  graph_SS: np.ndarray  # bool: links between switches, symmetric, one at most between two
  nic: float  # bytes/s of a NIC and of every link of a switch, one way
  nvlink: float  # bytes/s of a GPU to all others of its node, one way

  @property
  def nodes(self) -> int:
    return self.switch_NP.shape[0]

  @property
  def planes(self) -> int:
    return self.switch_NP.shape[1]

  @functools.cached_property
  def edge_SS(self) -> np.ndarray:
    """Number of each link between switches, by direction; -1 where there is none."""
    edge_SS = np.full(self.graph_SS.shape, -1)
    edge_SS[self.graph_SS] = 4 * self.switch_NP.size + np.arange(self.graph_SS.sum())
    return edge_SS

  @functools.cached_property
  def capacity_X(self) -> np.ndarray:
    """bytes/s of every link: out of NICs, into NICs, out to NVLink, in from NVLink, between switches."""
    sizes = [2 * self.switch_NP.size, 2 * self.switch_NP.size, int(self.graph_SS.sum())]
    return np.repeat([self.nic, self.nvlink, self.nic], sizes).astype(float)

  @functools.cached_property
  def port_NP(self) -> np.ndarray:
    """Which of its switch's NICs each NIC is: 0, 1, .. in order of nodes."""
    flat = self.switch_NP.ravel()
    order = np.argsort(flat, kind='stable')
    first = np.r_[True, np.diff(flat[order]) > 0]
    start = np.maximum.accumulate(np.where(first, np.arange(flat.size), 0))
    port = np.empty(flat.size, int)
    port[order] = np.arange(flat.size) - start
    return port.reshape(self.switch_NP.shape)

  @functools.cached_property
  def reach_SS(self) -> np.ndarray:
    """Whether at most two links lead from one switch to another, bool."""
    one = self.graph_SS.astype(np.float32)
    return np.eye(len(one), dtype=bool) | self.graph_SS | (one @ one > 0)

  def leaf_nodes(self, count: int, leaves: int = 1) -> np.ndarray:
    """`count` nodes, an equal number at each of `leaves` places that share no leaf; ValueError if full."""
    first = np.unique(self.switch_NP[:, 0], return_index=True)[1]  # node of each place
    per = np.diff(np.r_[first, self.nodes]).min()
    each, rest = divmod(count, leaves)
    if leaves > len(first) or rest or each > per:
      has = f'{self.name} has {len(first)} places of {per} nodes'
      raise ValueError(f'{count} nodes at {leaves} places: {has}')
    return (first[:leaves, None] + np.arange(each)).ravel()

  # ---- damage ------------------------------------------------------------------------------------

  def without_nic(self, node: int, plane: int) -> 'Fabric':
    """The cable between a node's NIC and its leaf is cut."""
    switch_NP = self.switch_NP.copy()
    switch_NP[node, plane] = -1
    return dataclasses.replace(self, switch_NP=switch_NP)

  def without_link(self, a: int, b: int) -> 'Fabric':
    """The cable between two switches is cut."""
    if not self.graph_SS[a, b]:
      raise ValueError(f'switches {a} and {b}: there is no link between them')
    graph_SS = self.graph_SS.copy()
    graph_SS[[a, b], [b, a]] = False
    return dataclasses.replace(self, graph_SS=graph_SS)

  def without_switch(self, *switches: int) -> 'Fabric':
    """Switches are off, and every cable to them is dead."""
    graph_SS, switch_NP = self.graph_SS.copy(), self.switch_NP.copy()
    graph_SS[list(switches)], graph_SS[:, list(switches)] = False, False
    switch_NP[np.isin(switch_NP, switches)] = -1
    return dataclasses.replace(self, graph_SS=graph_SS, switch_NP=switch_NP)

  def without_plane(self, plane: int) -> 'Fabric':
    """Every leaf that the plane's NICs are plugged into is off; in `mpft` that is the whole plane."""
    return self.without_switch(*np.setdiff1d(self.switch_NP[:, plane], [-1]))


def mpft(radix: int, planes: int, nic: float, nvlink: float) -> Fabric:
  """Multi-plane fat tree: node n is at leaf n // (radix / 2) of every plane."""
  net = topology.multi_plane(radix, planes)
  half = radix // 2
  leaf_N1 = np.arange(radix * half)[:, None] // half
  switch_NP = leaf_N1 + (radix + half) * np.arange(planes)[None]
  return Fabric('MPFT', switch_NP, _graph(net), nic, nvlink)


def mrft(radix: int, rails: int, nic: float, nvlink: float) -> Fabric:
  """Multi-rail fat tree of two layers: radix / 2 nodes share `rails` leaves, all leaves share the spines."""
  net = topology.fat_tree_2(radix)
  places = radix // rails
  if not 1 <= rails <= radix or radix % rails:
    raise ValueError(f'rails = {rails}: must divide the {radix} leaves of radix {radix}')
  place_N1 = np.arange(places * radix // 2)[:, None] // (radix // 2)
  return Fabric('MRFT', place_N1 * rails + np.arange(rails)[None], _graph(net), nic, nvlink)


def fat_tree(radix: int, gpus: int, nic: float, nvlink: float) -> Fabric:
  """Fat tree of two layers without rails: a leaf has all NICs of radix / 2 / gpus nodes."""
  net = topology.fat_tree_2(radix)
  per = radix // 2 // gpus if gpus > 0 else 0
  if per < 1:
    raise ValueError(f'{gpus} GPUs a node: a leaf of radix {radix} has {radix // 2} ports for them')
  leaf_N1 = np.arange(radix * per)[:, None] // per
  return Fabric('FT2', np.broadcast_to(leaf_N1, (radix * per, gpus)), _graph(net), nic, nvlink)


def _graph(net: topology.Topology) -> np.ndarray:
  return net.graph_SS.toarray().astype(bool)


# ---- routes --------------------------------------------------------------------------------------


class Use:
  """Collects, flow by flow, what share of its bytes goes over which link."""

  def __init__(self, fabric: Fabric, flows: int) -> None:
    self.fabric, self.flows = fabric, flows
    self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

  @property
  def matrix_XF(self) -> sparse.csr_array:
    """Bytes over each link per byte of each flow, [links, flows]."""
    link, flow, weight = (np.concatenate(part) for part in zip(*self._parts, strict=True))
    shape = len(self.fabric.capacity_X), self.flows
    return sparse.coo_array((weight, (link, flow)), shape=shape).tocsr()

  def add_nvlink(
    self,
    flow_I: np.ndarray,
    node_I: np.ndarray,
    src_I: np.ndarray,
    dst_I: np.ndarray,
    weight_I: np.ndarray,
  ) -> None:
    """From GPU to GPU of a node."""
    f = self.fabric
    for kind, plane_I in ((2, src_I), (3, dst_I)):
      self._parts.append((kind * f.switch_NP.size + node_I * f.planes + plane_I, flow_I, weight_I))

  def add_transfer(
    self,
    flow_I: np.ndarray,
    src_I2: np.ndarray,
    dst_I2: np.ndarray,
    routing: str,
    rng: np.random.Generator,
    forward: bool = True,
  ) -> None:
    """From GPU (node, plane) to GPU of another node; transfer i is part of flow `flow_I[i]`.

    `forward`: a transfer crosses on the plane of its destination, whose NIC it reaches by NVLink (NCCL's
    PXN); without, it leaves by its own NIC where the network connects the two.

    Raises:
      ValueError: nothing connects the two nodes, or `routing` is unknown.
    """
    if routing not in ROUTING:
      raise ValueError(f'routing {routing!r}: must be one of {", ".join(ROUTING)}')
    P, legs = self.fabric.planes, self._legs(flow_I, src_I2, dst_I2, routing, rng, forward)
    to_nic, from_nic = legs.src[:, 1] != legs.out, legs.dst[:, 1] != legs.into
    for at, (node, plane), there in ((to_nic, legs.src.T, True), (from_nic, legs.dst.T, False)):
      nic = legs.out if there else legs.into
      ends = (plane[at], nic[at]) if there else (nic[at], plane[at])
      self.add_nvlink(legs.flow[at], node[at], *ends, legs.weight[at])
    for first, node, plane in ((0, legs.src[:, 0], legs.out), (1, legs.dst[:, 0], legs.into)):
      link = first * self.fabric.switch_NP.size + node * P + plane
      self._parts.append((link, legs.flow, legs.weight))
    self._add_switches(legs, routing, rng)

  def _legs(
    self,
    flow_I: np.ndarray,
    src_I2: np.ndarray,
    dst_I2: np.ndarray,
    routing: str,
    rng: np.random.Generator,
    forward: bool,
  ) -> '_Legs':
    """The NICs of each transfer; one that lost its own is split over what is left, or draws one of them."""
    f, I = self.fabric, np.arange(len(flow_I))
    from_IP, to_IP = f.switch_NP[src_I2[:, 0]], f.switch_NP[dst_I2[:, 0]]
    usable_IP = (from_IP >= 0) & (to_IP >= 0) & f.reach_SS[from_IP, to_IP]
    direct_I = np.zeros(len(I), bool)
    if not forward:
      a_I, b_I = from_IP[I, src_I2[:, 1]], to_IP[I, dst_I2[:, 1]]
      direct_I = (a_I >= 0) & (b_I >= 0) & f.reach_SS[a_I, b_I]
    lost_I = ~direct_I & ~usable_IP.any(1)
    if lost_I.any():
      (i, p), (j, q) = src_I2[lost_I][0], dst_I2[lost_I][0]
      raise ValueError(
        f'{f.name}: no plane is left from GPU {p} of node {i} to GPU {q} of node {j}'
      )
    own_I = direct_I | usable_IP[I, dst_I2[:, 1]]
    may_IP = np.where(own_I[:, None], np.eye(f.planes, dtype=bool)[dst_I2[:, 1]], usable_IP)
    if routing != 'adaptive':
      number_I = (
        rng.integers(1 << 30, size=len(I)) if routing == 'ecmp' else (src_I2 + dst_I2).sum(1)
      )
      may_IP = _nth(may_IP, number_I)
    leg_I, into = np.nonzero(may_IP)
    out = np.where(direct_I[leg_I], src_I2[leg_I, 1], into)
    weight = 1 / may_IP.sum(1)[leg_I]
    return _Legs(flow_I[leg_I], src_I2[leg_I], dst_I2[leg_I], out, into, weight)

  def _add_switches(self, legs: '_Legs', routing: str, rng: np.random.Generator) -> None:
    """The links between the switch of one NIC and that of the other: none, one or two."""
    f = self.fabric
    a_I = f.switch_NP[legs.src[:, 0], legs.out]
    b_I = f.switch_NP[legs.dst[:, 0], legs.into]
    next_I = f.graph_SS[a_I, b_I]
    self._parts.append((f.edge_SS[a_I, b_I][next_I], legs.flow[next_I], legs.weight[next_I]))
    far_i = np.flatnonzero(~next_I & (a_I != b_I))
    pair_Z2, pair_i = np.unique(np.stack([a_I, b_I], -1)[far_i], axis=0, return_inverse=True)
    between_ZS = f.graph_SS[pair_Z2[:, 0]] & f.graph_SS[pair_Z2[:, 1]]
    some_s = np.flatnonzero(between_ZS.any(0))
    may_is = between_ZS[:, some_s][pair_i]
    if routing != 'adaptive':
      port_i = f.port_NP[legs.dst[far_i, 0], legs.into[far_i]]
      may_is = _nth(may_is, rng.integers(1 << 30, size=len(far_i)) if routing == 'ecmp' else port_i)
    path_i, via = np.nonzero(may_is)
    at, via = far_i[path_i], some_s[via]
    weight = legs.weight[at] / may_is.sum(1)[path_i]
    for link in (f.edge_SS[a_I[at], via], f.edge_SS[via, b_I[at]]):
      self._parts.append((link, legs.flow[at], weight))


@dataclasses.dataclass(frozen=True)
class _Legs:
  """Transfers, or parts of them, with the NICs that they use."""

  flow: np.ndarray
  src: np.ndarray  # (node, plane) of the GPU
  dst: np.ndarray
  out: np.ndarray  # plane of the NIC
  into: np.ndarray
  weight: np.ndarray  # of the flow's bytes


def _nth(may_IX: np.ndarray, number_I: np.ndarray) -> np.ndarray:
  """Of the true entries of each row only the one at `number`, modulo how many there are."""
  wanted_I = number_I % may_IX.sum(1)
  return may_IX & (np.cumsum(may_IX, 1, dtype=np.int32) == wanted_I[:, None] + 1)
