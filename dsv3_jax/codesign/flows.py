"""Collectives as flows on a fabric: max-min fair rates, and when everything has arrived.

A flow is what moves together: a transfer, a ring that no hop of which can run ahead of the others, or a
token's way over the network with its copies to the node's GPUs. Rates are max-min fair: all grow at the
same speed until a link is full, its flows stay at that, the others grow on. They are taken anew whenever
flows end. Queues, packets and congestion control are not modelled: hash collisions are, as links that
several flows share.

Bandwidth is as NCCL and DeepEP print it: `all_to_all` what a GPU sends to others, by time; rings NCCL's
bus bandwidth; `expert_dispatch` DeepEP's logical one, in which a node's own tokens count as sent.
"""

import dataclasses
import itertools
import math

import numpy as np
from scipy import sparse

from dsv3_jax import config
from dsv3_jax.codesign.fabric import Fabric, Use


def fair_rates(use_XF: sparse.csr_array, capacity_X: np.ndarray) -> np.ndarray:
  """Max-min fair bytes/s of each flow; use_XF[x, f] bytes on link x for each byte of flow f."""
  flows_by_link, links_by_flow = use_XF.tocsr(), use_XF.T.tocsr()
  rate_F, room_X = np.zeros(use_XF.shape[1]), capacity_X.astype(float).copy()
  active_F = np.ones(len(rate_F), bool)
  while active_F.any():
    load_X = flows_by_link @ active_F.astype(float)
    used_X = load_X > 1e-12
    if not used_X.any():
      raise ValueError('flows that use no link have no rate')
    grow = (room_X[used_X] / load_X[used_X]).min()
    rate_F[active_F] += grow
    room_X -= grow * load_X
    full_X = used_X & (room_X <= 1e-9 * capacity_X)
    active_F &= links_by_flow @ full_X.astype(float) == 0
  return rate_F


def finish(
  use_XF: sparse.csr_array, capacity_X: np.ndarray, bytes_F: np.ndarray, resolution: float = 0.01
) -> np.ndarray:
  """Seconds until each flow has ended. Flows that end within `resolution` of each other end at one event."""
  left_F, end_F, now = bytes_F.astype(float).copy(), np.zeros(len(bytes_F)), 0.0
  going = np.flatnonzero(left_F)
  columns = use_XF.tocsc()
  while len(going):
    rate = fair_rates(columns[:, going].tocsr(), capacity_X)
    need = left_F[going] / rate
    step = need.min()
    ended = need <= step + resolution * (now + step)
    end_F[going[ended]] = now + need[ended]
    left_F[going] -= rate * step
    now += step
    going = going[~ended]
  return end_F


@dataclasses.dataclass(frozen=True)
class Result:
  """Of one collective."""

  seconds: float
  bandwidth: float  # bytes/s; of a GPU, or of a ring group, mean over them
  busiest: float  # time that the fullest link between two switches needs, over `seconds`


def _run(use: Use, bytes_F: np.ndarray, sent_H: np.ndarray, group_F: np.ndarray) -> Result:
  """`sent_H`: bytes that count as sent by each group of flows; `group_F`: the group of each flow."""
  use_XF, capacity_X = use.matrix_XF, use.fabric.capacity_X
  end_F = finish(use_XF, capacity_X, bytes_F)
  end_H = np.zeros(len(sent_H))
  np.maximum.at(end_H, group_F, end_F)
  seconds, first = float(end_F.max()), 4 * use.fabric.switch_NP.size
  busy_X = (use_XF @ bytes_F)[first:] / capacity_X[first:]
  return Result(seconds, float((sent_H / end_H).mean()), float(busy_X.max(initial=0)) / seconds)


# ---- collectives ---------------------------------------------------------------------------------


def all_to_all(
  f: Fabric,
  nodes: np.ndarray,
  size: float,
  *,
  routing: str = 'adaptive',
  forward: bool = True,
  seed: int = 0,
) -> Result:
  """Every GPU of `nodes` sends size / GPUs bytes to every other at once."""
  gpu_G2 = _gpus(f, nodes)
  G = len(gpu_G2)
  a, b = np.nonzero(~np.eye(G, dtype=bool))
  use = Use(f, len(a))
  across = gpu_G2[a, 0] != gpu_G2[b, 0]
  far, near = np.flatnonzero(across), np.flatnonzero(~across)
  rng = np.random.default_rng(seed)
  use.add_transfer(far, gpu_G2[a[far]], gpu_G2[b[far]], routing, rng, forward)
  use.add_nvlink(
    near, gpu_G2[a[near], 0], gpu_G2[a[near], 1], gpu_G2[b[near], 1], np.ones(len(near))
  )
  everyone = np.zeros(len(a), int)  # nobody is through before all are
  return _run(use, np.full(len(a), size / G), np.array([size * (G - 1) / G]), everyone)


def all_gather(
  f: Fabric,
  nodes: np.ndarray,
  size: float,
  *,
  tensor_parallel: int = 1,
  routing: str = 'adaptive',
  seed: int = 0,
) -> Result:
  """All-gather, or reduce-scatter the other way round, of `size` bytes in every data-parallel group.

  GPUs t, t + tensor_parallel, .. of all nodes are group t; all groups run at once. A group has one ring
  for each of its GPUs in a node, and each takes an equal share. A ring enters a node by one NIC, visits
  the group's GPUs by NVLink and leaves by another, by which it enters the next node: nothing is forwarded
  across rails, and each NIC carries one ring out and one in.
  """
  P, N = f.planes, len(nodes)
  if tensor_parallel < 1 or P % tensor_parallel:
    raise ValueError(f'tensor_parallel = {tensor_parallel}: must divide {P} GPUs of a node')
  each = P // tensor_parallel
  use, rng = Use(f, P), np.random.default_rng(seed)
  inside, hops = [], []
  for ring in range(P):
    group, own = ring % tensor_parallel, ring // tensor_parallel
    plane = lambda k, group=group: group + (k % each) * tensor_parallel
    for i, node in enumerate(nodes):
      # In by `own` and out by the next one at even nodes, the other way round at odd ones.
      step = 1 if i % 2 == 0 else -1
      enter = own if i % 2 == 0 else own + 1
      order = [plane(enter - step * k) for k in range(each)]
      inside += [(ring, node, a, b) for a, b in itertools.pairwise(order)]
      to = nodes[(i + 1) % N], plane(own if (i + 1) % N % 2 == 0 else own + 1)
      hops += [(ring, node, order[-1], *to)] if N > 1 else []
  if inside:
    ring, node, a, b = np.array(inside).T
    use.add_nvlink(ring, node, a, b, np.ones(len(ring)))
  if hops:
    hop = np.array(hops)
    use.add_transfer(hop[:, 0], hop[:, 1:3], hop[:, 3:5], routing, rng)
  sent = size * (each * N - 1) / (each * N)
  group_F = np.arange(P) % tensor_parallel
  return _run(use, np.full(P, sent / each), np.full(tensor_parallel, sent), group_F)


def expert_dispatch(
  f: Fabric,
  nodes: np.ndarray,
  moe: config.Moe,
  *,
  tokens: int = 4096,
  row: float = 7168.0,
  routing: str = 'adaptive',
  seed: int = 0,
) -> Result:
  """Two hops to the experts of `tokens` tokens a GPU, as DeepEP's normal kernels; combine is its mirror.

  Experts are spread evenly over the GPUs, a node is one group, and a token's experts are any of its
  min(top_groups, nodes) nodes. To each node with experts of its own a token goes once, by the network to
  the GPU of its index, then by NVLink to every GPU that needs it, which goes through the same buffers,
  and therefore counts the same, where that is the GPU itself: DeepEP's kernels inside one node reach
  153 GB/s of 160 when counted so. `row` bytes a token (FP8: 7168; a combine sends 14336).

  Raises:
    ValueError: the GPUs cannot have equally many experts each.
  """
  P, N = f.planes, len(nodes)
  if moe.num_experts % (N * P):
    raise ValueError(f'{N * P} GPUs: must divide model.moe.num_experts = {moe.num_experts}')
  to_node, to_gpu = expected_spread(moe, N, P)
  gpu_G2 = _gpus(f, nodes)
  a, b = (x.ravel() for x in np.meshgrid(np.arange(len(gpu_G2)), np.arange(N), indexing='ij'))
  src, node, plane = gpu_G2[a], nodes[b], gpu_G2[a, 1]
  use, rng = Use(f, len(a)), np.random.default_rng(seed)
  far = np.flatnonzero(src[:, 0] != node)
  dst = np.stack([node, plane], -1)
  use.add_transfer(far, src[far], dst[far], routing, rng)
  flow, to = (x.ravel() for x in np.meshgrid(np.arange(len(a)), np.arange(P), indexing='ij'))
  use.add_nvlink(flow, node[flow], plane[flow], to, np.full(len(flow), to_gpu / to_node))
  sent = tokens * row * to_node
  return _run(use, np.full(len(a), sent), np.array([sent * N]), np.zeros(len(a), int))


def expected_spread(moe: config.Moe, nodes: int, planes: int) -> tuple[float, float]:
  """Probability that a token has an expert on a given node, and on a given GPU, where a node is a group."""
  kept = min(moe.top_groups, nodes)
  inside = moe.num_experts // nodes
  pool, K = kept * inside, moe.top_k
  if pool < K:
    raise ValueError(f'model.moe.top_k = {K}: {kept} groups of {nodes} have {pool} experts')
  hit = lambda experts: kept / nodes * (1 - math.comb(pool - experts, K) / math.comb(pool, K))
  return hit(inside), hit(inside // planes)


def _gpus(f: Fabric, nodes: np.ndarray) -> np.ndarray:
  """(node, plane) of every GPU of the nodes, [G, 2]."""
  node, plane = np.meshgrid(nodes, np.arange(f.planes), indexing='ij')
  return np.stack([node.ravel(), plane.ravel()], -1)
