"""Networks of switches as graphs: what a radix can build, and what it costs (arXiv 2505.09343, Table 3).

| name | what                                                    | endpoints of radix k           |
|------|---------------------------------------------------------|--------------------------------|
| FT2  | fat tree, leaves and spines                             | k^2 / 2                        |
| MPFT | FT2 for each GPU of a node, not connected to each other | planes k^2 / 2                 |
| FT3  | fat tree, edges, aggregations and cores                 | k^3 / 4                        |
| SF   | Slim Fly: McKay-Miller-Siran graph over a field of q    | 2 q^2 ceil(degree / 2)         |
| DF   | Dragonfly: full groups, fully connected by global links | (a h + 1) a p, a = 2 p = 2 h   |

Every graph is made of its links, and every figure is counted on it. Two printed columns of Table 3 are
of networks that cannot be built, or are not the largest:

- SF prints 1,568 switches, 2 q^2 of q = 28. No field has 28 elements, so the graph does not exist:
  `slim_fly_counts` gives the printed figures from the formulas, `slim_fly` the largest one that does.
- DF prints 511 groups, where 32 switches of 16 global ports connect up to 513; its links are those of
  511 groups with every global port in use, two groups of each then being connected twice.

Sparse matrices and graph algorithms are SciPy's, which JAX brings along: no further dependency.
"""

import dataclasses
import functools
import itertools
import math

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph


@dataclasses.dataclass(frozen=True)
class Prices:
  """k$ of a switch of 64 ports and of a cable at 400 Gb/s, by the method of Slim Fly (SC 2014).

  That method prices a switch by its ports and a cable by its length: copper to an endpoint, fibre between
  switches, somewhat shorter inside a Dragonfly's group. Table 3 prints no price. These four give all ten
  of its printed costs to the last digit, and are one choice of many: a switch may cost 32 to 82 k$ if the
  cables follow. Four prices against four independent columns: they are read off the table, and do not
  check it.
  """

  switch: float = 50.0
  fibre: float = 1.54
  short: float = 1.46
  endpoint: float = 0.507

  def total(self, radix: int, endpoints: int, switches: int, links: int, short: int = 0) -> float:
    """k$ of a network, `short` of its links inside groups; a switch costs in proportion to its ports."""
    cables = self.fibre * (links - short) + self.short * short + self.endpoint * endpoints
    return self.switch * radix / 64 * switches + cables


@dataclasses.dataclass(frozen=True, eq=False)
class Topology:
  """Switches 0 .. S-1, endpoints at some of them, and links between them."""

  name: str
  radix: int
  endpoints_S: np.ndarray  # int64: endpoints plugged into each switch
  links_X2: np.ndarray  # int64: a pair of switches per link; twice where they have two
  short: int = 0  # of the links, the first so many are inside a group

  @property
  def endpoints(self) -> int:
    return int(self.endpoints_S.sum())

  @property
  def switches(self) -> int:
    return len(self.endpoints_S)

  @property
  def links(self) -> int:
    """Between switches; the cables of endpoints are not counted."""
    return len(self.links_X2)

  @property
  def ports_S(self) -> np.ndarray:
    """In use at each switch."""
    return self.endpoints_S + np.bincount(self.links_X2.ravel(), minlength=self.switches)

  @functools.cached_property
  def graph_SS(self) -> sparse.csr_array:
    """Links between each two switches, symmetric, int32."""
    a_X, b_X = self.links_X2.T
    one_X = np.ones(len(a_X), np.int32)
    half = sparse.coo_array((one_X, (a_X, b_X)), shape=(self.switches,) * 2)
    return sparse.csr_array(half + half.T)

  @property
  def components(self) -> int:
    """Parts that no link joins: 1, or the planes of a multi-plane network."""
    return int(csgraph.connected_components(self.graph_SS, directed=False)[0])

  def hops(self, sources: np.ndarray) -> np.ndarray:
    """Links on a shortest path from each source to each switch, [sources, S]; inf where there is none."""
    return csgraph.shortest_path(self.graph_SS, unweighted=True, indices=sources)

  def diameter(self, sources: int | None = None) -> int:
    """Most links between two switches with endpoints that are connected, from all or the first `sources`."""
    with_endpoints = np.flatnonzero(self.endpoints_S)
    hops = self.hops(with_endpoints[:sources])[:, with_endpoints]
    return int(hops[np.isfinite(hops)].max())

  def cost(self, prices: Prices | None = None) -> float:
    """k$ of switches and cables, endpoint cables included."""
    p = prices or Prices()
    return p.total(self.radix, self.endpoints, self.switches, self.links, self.short)


# ---- fat trees -----------------------------------------------------------------------------------


def fat_tree_2(radix: int, name: str = 'FT2') -> Topology:
  """`radix` leaves, then radix / 2 spines, one link between each two; half of a leaf's ports go down."""
  half = _half(radix, 'a fat tree')
  leaf, spine = np.arange(radix), radix + np.arange(half)
  endpoints_S = np.repeat([half, 0], [radix, half])
  return Topology(name, radix, endpoints_S, _all_pairs(leaf, spine))


def multi_plane(radix: int, planes: int = 8) -> Topology:
  """`planes` two-layer fat trees side by side; plane p has the p-th GPU and NIC of every node."""
  if planes < 1:
    raise ValueError(f'planes = {planes}: must be at least 1')
  one = fat_tree_2(radix)
  first = one.switches * np.arange(planes)
  links_X2 = (first[:, None, None] + one.links_X2).reshape(-1, 2)
  return Topology('MPFT', radix, np.tile(one.endpoints_S, planes), links_X2)


def fat_tree_3(radix: int) -> Topology:
  """`radix` pods of radix / 2 edges and as many aggregations, then (radix / 2)^2 cores."""
  half = _half(radix, 'a fat tree')
  edges = radix * half
  edge_PX = np.arange(edges).reshape(radix, half)
  above_PX = edges + edge_PX
  core_XX = 2 * edges + np.arange(half * half).reshape(half, half)
  inside = [_all_pairs(edge_PX[pod], above_PX[pod]) for pod in range(radix)]
  # The x-th aggregation of every pod has the x-th row of cores.
  across = [_all_pairs(above_PX[:, x], core_XX[x]) for x in range(half)]
  endpoints_S = np.repeat([half, 0], [edges, edges + half * half])
  return Topology('FT3', radix, endpoints_S, np.concatenate(inside + across))


# ---- Slim Fly ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Counts:
  """What the formulas say of a network that need not exist."""

  endpoints: int
  switches: int
  links: int
  radix: int  # ports that a switch needs


def slim_fly_counts(q: int) -> Counts:
  """2 q^2 switches of degree (3 q - d) / 2, q = 4 w + d, d in -1, 0, 1; half as many endpoints each."""
  if q < 3 or q % 4 == 2:
    raise ValueError(f'q = {q}: must be 4 w - 1, 4 w or 4 w + 1, and at least 3')
  degree = (3 * q - (-1 if q % 4 == 3 else q % 4)) // 2
  down = -(-degree // 2)
  return Counts(2 * q * q * down, 2 * q * q, q * q * degree, degree + down)


def slim_fly(radix: int, q: int | None = None) -> Topology:
  """The largest balanced Slim Fly of a radix, or the one over `q` elements; its diameter is 2.

  Raises:
    ValueError: there is no field of q elements, or q needs more ports.
  """
  if q is None:
    fits = (n for n in range(3, radix) if n % 4 != 2 and _prime_power(n))
    q = max((n for n in fits if slim_fly_counts(n).radix <= radix), default=None)
    if q is None:
      raise ValueError(f'radix = {radix}: the smallest Slim Fly has q = 3 and needs 8 ports')
  counts = slim_fly_counts(q)
  if not _prime_power(q):
    raise ValueError(f'q = {q}: must be a power of a prime; no field has {q} elements')
  if counts.radix > radix:
    raise ValueError(f'radix = {radix}: q = {q} needs {counts.radix} ports')
  plus_QQ, times_QQ, power = _field(q)
  even, odd = _generators(q)
  x, y, m = np.arange(q), np.arange(q), np.arange(q)
  inside = []
  for part, exponents in ((0, even), (1, odd)):
    # (part, x, y) - (part, x, y + s) for each generator s; both s and -s are in the set.
    step = np.unique(power[np.array(exponents) % (q - 1)])
    other_YX = plus_QQ[y][:, step]
    pair = np.stack([np.broadcast_to(y[:, None], other_YX.shape), other_YX], -1).reshape(-1, 2)
    pair = pair[pair[:, 0] < pair[:, 1]]
    inside.append((part * q * q + q * x[:, None, None] + pair).reshape(-1, 2))
  # (0, x, y) - (1, m, c) where y = m x + c.
  at = np.array(list(itertools.product(x, m, range(q))))
  ends = plus_QQ[times_QQ[at[:, 1], at[:, 0]], at[:, 2]]
  across = np.stack([q * at[:, 0] + ends, q * q + q * at[:, 1] + at[:, 2]], -1)
  endpoints_S = np.full(counts.switches, counts.endpoints // counts.switches)
  return Topology('SF', radix, endpoints_S, np.concatenate([*inside, across]))


def _generators(q: int) -> tuple[list[int], list[int]]:
  """Exponents of the primitive element in the two generator sets (Hafner 2004)."""
  w = (q + 1) // 4
  if q % 4 == 3:
    even = [*range(0, 2 * w - 1, 2), *range(2 * w - 1, 4 * w - 2, 2)]
    return even, [*range(1, 2 * w, 2), *range(2 * w, 4 * w - 1, 2)]
  return list(range(0, q - 1, 2)), list(range(1, q, 2))


def _prime_power(q: int) -> tuple[int, int] | None:
  """(p, n) with p^n = q, p prime; None where there are none."""
  p = next((p for p in range(2, q + 1) if q % p == 0), 0)
  n = round(math.log(q, p)) if p else 0
  return (p, n) if p and p**n == q else None


def _field(q: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Sums [q, q], products [q, q] and powers of a primitive element [q - 1] of the field of q elements.

  Elements are numbers below q whose digits to base p are coefficients of a polynomial, lowest first.
  """
  p, n = _prime_power(q)
  digits_Qn = np.stack([np.arange(q) // p**i % p for i in range(n)], -1)
  place_n = p ** np.arange(n)
  plus_QQ = (digits_Qn[:, None] + digits_Qn[None]) % p @ place_n
  for low_n in itertools.product(range(p), repeat=n):  # of x^n = low
    by_x = lambda e_n, low_n=low_n: (np.r_[0, e_n[:-1]] + e_n[-1] * np.array(low_n)) % p
    if n == 1:
      by_x = lambda e_n, low_n=low_n: e_n * low_n[0] % p  # x is the element low itself
    powers, e_n = [], digits_Qn[1]
    for _ in range(q - 1):
      powers.append(int(e_n @ place_n))
      e_n = by_x(e_n)
    if len(set(powers)) == q - 1 and 0 not in powers:
      break
  power = np.array(powers)
  log_Q = np.zeros(q, int)
  log_Q[power] = np.arange(q - 1)
  times_QQ = power[(log_Q[:, None] + log_Q[None]) % (q - 1)]
  times_QQ[0], times_QQ[:, 0] = 0, 0
  return plus_QQ, times_QQ, power


# ---- Dragonfly -----------------------------------------------------------------------------------


def dragonfly(radix: int, groups: int | None = None) -> Topology:
  """Groups of a switches, all connected, with p endpoints and h global links each; a = 2 p = 2 h.

  The largest has a h + 1 groups, one link between each two. With fewer, global ports that are left over
  connect neighbours a second time. A switch uses 4 h - 1 ports.

  Raises:
    ValueError: the radix has no room for h = 1, or does not connect so many groups.
  """
  h = (radix + 1) // 4
  if h < 1:
    raise ValueError(f'radix = {radix}: a Dragonfly needs at least 3 ports')
  a = 2 * h
  most = a * h + 1
  groups = most if groups is None else groups
  if not 2 <= groups <= most:
    raise ValueError(f'groups = {groups}: radix {radix} connects 2 to {most}')
  each, spare = divmod(a * h, groups - 1)
  first, second = np.triu_indices(a, 1)
  local = np.arange(groups)[:, None, None] * a + np.stack([first, second], -1)
  # Distances around the ring of groups: each pair `each` times, and the nearest once more.
  ends = [np.stack(np.triu_indices(groups, 1), -1)] * each
  start = np.arange(groups)
  for distance in range(1, spare // 2 + 1):
    ends.append(np.stack([start, (start + distance) % groups], -1))
  if spare % 2:  # a h is even, so `groups` is too
    ends.append(np.stack([start[: groups // 2], start[: groups // 2] + groups // 2], -1))
  group_X2 = np.concatenate(ends)
  switch_X2 = a * group_X2 + _port(group_X2, groups).reshape(-1, 2) // h
  links_X2 = np.concatenate([local.reshape(-1, 2), switch_X2])
  endpoints_S = np.full(groups * a, h)
  return Topology('DF', radix, endpoints_S, links_X2, short=groups * len(first))


def _port(group_X2: np.ndarray, groups: int) -> np.ndarray:
  """The global port of its group that each end takes: 0, 1, .. in order of the links, flattened."""
  flat = group_X2.ravel()
  order = np.argsort(flat, kind='stable')
  start = np.r_[0, np.cumsum(np.bincount(flat, minlength=groups))][:-1]
  port = np.empty(len(flat), int)
  port[order] = np.arange(len(flat)) - start[flat[order]]
  return port


def _half(radix: int, what: str) -> int:
  if radix < 2 or radix % 2:
    raise ValueError(
      f'radix = {radix}: {what} needs an even number of ports, half down and half up'
    )
  return radix // 2


def _all_pairs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  return np.stack(np.meshgrid(a, b, indexing='ij'), -1).reshape(-1, 2)


# ---- Table 3 -------------------------------------------------------------------------------------

# Endpoints, switches, links, M$, k$ per endpoint, as printed for 64 ports.
TABLE_3 = {
  'FT2': (2_048, 96, 2_048, '9', '4.39'),
  'MPFT': (16_384, 768, 16_384, '72', '4.39'),
  'FT3': (65_536, 5_120, 131_072, '491', '7.5'),
  'SF': (32_928, 1_568, 32_928, '146', '4.4'),
  'DF': (261_632, 16_352, 384_272, '1522', '5.8'),
}


def build(radix: int, planes: int = 8) -> dict[str, Topology]:
  """The largest of each kind that can be built; raises ValueError with the number that is impossible."""
  return {
    'FT2': fat_tree_2(radix),
    'MPFT': multi_plane(radix, planes),
    'FT3': fat_tree_3(radix),
    'SF': slim_fly(radix),
    'DF': dragonfly(radix),
  }
