"""What a routing sends over slow and fast links, and how even placement of experts makes it.

From a recorded trace (`python -m dsv3_jax.trace`) or one made up with a skew (`parallel/skews.py`). Rows
are counted, not estimated:

| form        | crosses slow links                        | crosses fast links                |
|-------------|-------------------------------------------|-----------------------------------|
| one by one  | every (token, expert) on another node     | every other on another device     |
| flat        | a token once to each device that needs it | the same                          |
| two-hop     | a token once to each node that needs it   | once to each device there         |

Combine is the mirror. Bytes a row: FP8 with a power-of-two scale for 128 values, BF16, LogFMT with the ends
of 128 values in BF16 each (9,184 bytes for 7,168 values in 10 bits).
"""

import dataclasses

import numpy as np
from matplotlib.axes import Axes

from dsv3_jax import config
from dsv3_jax.codesign.hardware import H800, Hardware
from dsv3_jax.codesign.table import Chart, Row, Section, Table
from dsv3_jax.parallel import placement, skews
from dsv3_jax.parallel.trace import Trace

FORMATS = ('fp8', 'bf16', 'logfmt10', 'logfmt8')
FORMS = ('one by one', 'flat', 'two-hop')
_TOKENS = 128  # of a device, where the routing is made up


def row_bytes(kind: str, dim: int) -> float:
  """Of one token; raises ValueError for an unknown format."""
  tiles = -(-dim // 128)
  sizes = {'bf16': 2 * dim, 'fp8': dim + tiles}
  sizes |= {f'logfmt{bits}': dim * bits / 8 + 4 * tiles for bits in (8, 10)}
  if kind not in sizes:
    raise ValueError(f'format {kind!r}: must be one of {", ".join(FORMATS)}')
  return sizes[kind]


@dataclasses.dataclass(frozen=True)
class Traffic:
  """Rows that one device sends, mean, for each of its tokens."""

  slow: float
  fast: float


def count(form: str, ids_nTK: np.ndarray, num_experts: int, node: int, local: int) -> Traffic:
  """Of dispatch; experts lie in order on node x local devices, ids_nTK are the devices' tokens."""
  if form not in FORMS:
    raise ValueError(f'form {form!r}: must be one of {", ".join(FORMS)}')
  tokens = ids_nTK.shape[1]
  if form == 'one by one':
    device_nTK = ids_nTK // (num_experts // (node * local))
    own_n = np.arange(node * local)[:, None, None]
    other_nTK = device_nTK != own_n
    across_nTK = device_nTK // local != own_n // local
    slow, every = across_nTK.sum() / len(ids_nTK), other_nTK.sum() / len(ids_nTK)
    return Traffic(slow / tokens, (every - slow) / tokens)
  name = 'two_hop' if form == 'two-hop' else 'flat'
  rows = skews.useful_rows(name, ids_nTK, num_experts, node, local)
  return Traffic(rows['node'] / tokens, rows['local'] / tokens)


def check_trace(trace: Trace, moe: config.Moe) -> None:
  """Raises ValueError unless the trace is of a router of these sizes."""
  for name in ('num_experts', 'num_groups', 'top_groups', 'top_k'):
    found, want = getattr(trace, name), getattr(moe, name)
    if found != want:
      raise ValueError(f'trace of {trace.model}: has {name} = {found}; the config has {want}')


def mesh_of(moe: config.Moe, hardware: Hardware) -> tuple[int, int]:
  """Nodes and devices a node that share the experts: a node for each group, as in the report's run.

  Nodes have the chips of the fast network, or as many of them as experts of a group go round.
  """
  inside = moe.num_experts // moe.num_groups
  local = max(n for n in range(1, min(inside, hardware.chips, 8) + 1) if inside % n == 0)
  return moe.num_groups, local


def routings(
  moe: config.Moe, devices: int, trace: Trace | None, seed: int = 0
) -> dict[str, np.ndarray]:
  """Made-up routings by skew, or each fourth of the trace's layers; ids [devices, tokens, K]."""
  if trace is None:
    return {
      name: skews.make(name, moe, devices, _TOKENS, seed)
      for name in ('uniform', 'zipf', 'sequence')
    }
  check_trace(trace, moe)
  if trace.tokens < devices:
    raise ValueError(
      f'trace of {trace.model}: has {trace.tokens} tokens; {devices} devices want one each'
    )
  layers = sorted({0, trace.layers // 3, 2 * trace.layers // 3, trace.layers - 1})
  each = trace.tokens // devices
  part = lambda y: trace.ids_YTK[y, : each * devices].reshape(devices, each, -1).astype(np.int32)
  return {f'MoE layer {y}': part(y) for y in layers}


def section(c: config.Config, hardware: Hardware, trace: Trace | None = None) -> Section:
  moe, dim = c.model.moe, c.model.dim
  node, local = mesh_of(moe, hardware)
  routed = routings(moe, node * local, trace)
  first = next(iter(routed))
  counted = {
    (name, form): count(form, ids, moe.num_experts, node, local)
    for name, ids in routed.items()
    for form in FORMS
  }
  spread = []
  for name, ids in routed.items():
    about = skews.describe(ids, moe.num_experts, node, local)
    limit = f'at most {moe.top_groups}' if moe.top_groups < moe.num_groups else ''
    spread.append(Row(f'{name}: nodes a token', about['nodes_per_token'], '', note=limit))
    spread.append(Row(f'{name}: devices a token', about['devices_per_token']))
  sent = [
    Row(f'{name}, {form}', counted[name, form].slow, 'rows a token')
    for name in routed
    for form in FORMS
  ]
  size = tuple(Row(f'a row in {kind}', row_bytes(kind, dim), 'B') for kind in FORMATS)
  best = counted[first, 'two-hop']
  costs = []
  for out, back in (('bf16', 'bf16'), ('fp8', 'bf16'), ('fp8', 'logfmt10'), ('fp8', 'logfmt8')):
    each = row_bytes(out, dim) + row_bytes(back, dim)
    slow_s = best.slow * each * 4096 / hardware.slow.achieved
    fast_s = best.fast * each * 4096 / hardware.fast.achieved
    costs.append(
      Row(
        f'two-hop, {out} out, {back} back',
        1e3 * max(slow_s, fast_s),
        'ms a layer',
        note=f'{1e3 * slow_s:.2f} slow, {1e3 * fast_s:.2f} fast, 4,096 tokens a device',
      )
    )

  def draw(axes: Axes) -> None:
    for i, form in enumerate(FORMS):
      at = np.arange(len(routed)) + 0.26 * (i - 1)
      traffic = [counted[name, form] for name in routed]
      axes.bar(at, [t.slow for t in traffic], 0.24, label=f'{form}', color=_COLORS[i])
    axes.set_xticks(range(len(routed)), list(routed))
    axes.set(ylabel='rows over slow links, a token')
    axes.legend(fontsize=8, ncols=3, loc='lower left', bbox_to_anchor=(0, 1))

  where = f'{node} nodes of {local}'
  source = f'recorded: {trace.model}' if trace else f'made up, {_TOKENS} tokens a device'
  return Section(
    'Expert traffic',
    f'Limiting a token to {moe.top_groups} of {moe.num_groups} groups bounds what crosses between nodes '
    f'once tokens are sent to nodes, not to experts. {where} devices, routing {source}.',
    (
      Table('Where tokens go', tuple(spread)),
      Table('Dispatch between nodes', tuple(sent)),
      Table('Bytes', size),
      Table(f'Dispatch and combine of {first} routing on {hardware.name}', tuple(costs)),
      _links(),
      _balance(c, routed),
    ),
    (Chart('Dispatch between nodes', draw),),
  )


_COLORS = ('#e07b39', '#8e5ea8', '#2f6db5')


def _links() -> Table:
  """2412.19437, 3.2.2: what fast links give for free beside slow ones."""
  ratio = H800.fast.achieved / H800.slow.nominal
  note = 'the report divides 160 achieved by 50 nominal; both achieved it is 4 to 1 (2505.09343)'
  rows = (
    Row('H800: NVLink over InfiniBand', ratio, 'times', '3.2', note),
    Row('experts on 4 nodes that cost no more', 4 * ratio, '', '13'),
  )
  return Table('Fast links beside slow ones', rows)


def _balance(c: config.Config, routed: dict[str, np.ndarray]) -> Table:
  """Fullest device over the mean: experts in order, and placed by load with 32 copies (an eighth)."""
  moe, rows = c.model.moe, []
  devices = 32 if moe.num_experts % 32 == 0 else moe.num_groups
  nodes = next(n for n in (4, 2, 1) if devices % n == 0 and moe.num_groups % n == 0)
  slots = moe.num_experts + devices * max(1, moe.num_experts // 8 // devices)
  for name, ids in routed.items():
    load_YE = np.bincount(ids.ravel(), minlength=moe.num_experts)[None].astype(float)
    start = placement.in_order(1, moe.num_experts, devices)
    placed = placement.place(
      load_YE, slots=slots, groups=moe.num_groups, nodes=nodes, devices=devices
    )
    free = placement.place(load_YE, slots=slots, groups=1, nodes=1, devices=devices)
    for how, p in (('in order', start), ('groups on nodes', placed), ('anywhere', free)):
      rows.append(Row(f'{name}: {how}', float(p.unevenness(load_YE)[0]), 'of mean load'))
  return Table(
    f'Fullest of {devices} devices, {slots - moe.num_experts} copies (EPLB)', tuple(rows)
  )
