"""Sections on the network of arXiv 2505.09343: Table 3, Figures 5 to 8, failures, Table 5.

Values of Figures 7 and 8 were read off the plots by others. Sections are simulated for a machine whose fast
network joins the GPUs of one node, with one NIC each, on switches of 64 ports (of 128 for RoCE).
"""

import numpy as np
from matplotlib.axes import Axes

from dsv3_jax import config
from dsv3_jax.codesign import fabric, flows, latency, topology
from dsv3_jax.codesign.fabric import Fabric
from dsv3_jax.codesign.hardware import Hardware
from dsv3_jax.codesign.table import Chart, Row, Section, Table

RADIX = 64  # ports of the paper's InfiniBand switches
ROCE_RADIX = 128
SIZES = (16, 32, 64, 128)  # GPUs
# GB/s of dispatch and of combine on so many GPUs; of all-gather under ECMP and under adaptive or static
# routing with so many GPUs in a tensor-parallel group.
FIGURE_7 = {
  16: ('43.05', '42.47'), 32: ('58.02', '56.96'), 64: ('50.58', '48.54'), 128: ('45.34', '41.6'),
}  # fmt: skip
FIGURE_8 = {8: ('45', '57'), 4: ('83', '103'), 2: ('97', '190')}
_GIGA = 1e9
_SIZE = 1e9  # bytes of a collective; no ratio depends on it


# ---- Table 3 -------------------------------------------------------------------------------------


def topologies(
  c: config.Config, h: Hardware, radix: int = RADIX, prices: topology.Prices | None = None
) -> Section:
  """Endpoints, switches, links and cost of each kind of network, built as large as the radix allows.

  For the radix of Table 3 also of the two that it prints and that are not those: Slim Fly by its formulas,
  and a Dragonfly of two groups less.

  Raises:
    ValueError: a kind cannot be built of the radix; the message says which number is impossible.
  """
  del c
  planes = h.chips if h.chips <= RADIX else 8  # as many as a node has NICs
  p = prices or topology.Prices()
  sizes = {
    name: (t.endpoints, t.switches, t.links, t.cost(p))
    for name, t in topology.build(radix, planes).items()
  }
  printed, notes = {}, {}
  if (radix, planes) == (RADIX, 8):
    printed = {name: topology.TABLE_3[name] for name in ('FT2', 'MPFT', 'FT3')}
    sf, df = topology.slim_fly_counts(28), topology.dragonfly(radix, 511)
    counts = sf.endpoints, sf.switches, sf.links
    sizes['SF, q = 28'] = (*counts, p.total(radix, *counts))
    sizes['DF, 511 groups'] = df.endpoints, df.switches, df.links, df.cost(p)
    printed |= {'SF, q = 28': topology.TABLE_3['SF'], 'DF, 511 groups': topology.TABLE_3['DF']}
    notes['SF'] = 'q = 27, the largest that exists'
    notes['SF, q = 28'] = 'formulas alone: no field has 28 elements, so there is no such graph'
    notes['DF'] = '513 groups, all that can be connected'
  rows = []
  for name, (endpoints, switches, links, cost) in sizes.items():
    values = endpoints, switches, links, cost / 1e3, cost / endpoints
    named = (
      ('endpoints', ''),
      ('switches', ''),
      ('links', ''),
      ('cost', 'M$'),
      ('per endpoint', 'k$'),
    )
    published = map(str, printed[name]) if name in printed else [None] * 5
    for (what, unit), value, given in zip(named, values, published, strict=True):
      rows.append(Row(f'{name}: {what}', float(value), unit, given, notes.get(name, '')))
  text = (
    'Networks of switches as graphs, counted (2505.09343, Table 3). Links are those between switches. '
    'Prices are read off the printed costs and so do not check them: a switch of 64 ports '
    f'{p.switch:g} k$, a cable between switches {p.fibre:g}, inside a Dragonfly group {p.short:g}, to an '
    f'endpoint {p.endpoint:g}. A switch of other radix costs in proportion.'
  )
  title = f'Switches of {radix} ports, {planes} planes'
  return Section('Topologies', text, (Table(title, tuple(rows)),), (_by_radix(planes, p),))


def _by_radix(planes: int, prices: topology.Prices) -> Chart:
  """k$ an endpoint over how many endpoints there can be, for radices up to 64."""
  points = {}
  for radix in (16, 24, 32, 48, 64):
    for name, t in topology.build(radix, planes).items():
      points.setdefault(name, []).append((t.endpoints, t.cost(prices) / t.endpoints))

  def draw(axes: Axes) -> None:
    for name, pairs in points.items():
      axes.plot(*zip(*pairs, strict=True), marker='o', markersize=3, label=name)
    axes.set(
      xscale='log', xlabel='endpoints, for radix 16 to 64', ylabel='k$ per endpoint', ylim=(0, None)
    )
    axes.legend()

  return Chart('Cost over size', draw)


# ---- Figures 5 to 8 ------------------------------------------------------------------------------


def traffic(c: config.Config, h: Hardware) -> Section:
  """All-to-all on planes and rails, expert dispatch against DeepEP, all-gather under three routings."""
  text = (
    'Flows with max-min fair rates on leaves, spines and NVLink. Figures 5 and 6: forwarded by NVLink '
    '(PXN), planes and rails send the same bytes by the same NICs. Figure 7: up to 2 nodes NVLink is '
    'the limit, and the pipeline over both networks that was measured stays 12 to 13 % below what NVLink '
    'alone carries; from 4 nodes on the NIC is, of which dispatches reach 42 to 44 GB/s where 40 are assumed. '
    'Figure 8: 16 nodes at 4 leaves without rails; the paper tells neither number, so that ratios '
    'are to be compared.'
  )
  if (reason := _cannot(h)) is not None:
    return _not_simulated('Traffic', h, reason)
  tables = [
    Table('All-to-all, GB/s that a GPU sends (Figures 5 and 6)', tuple(_all_to_all(h))),
    Table('Dispatch and combine, DeepEP (Figure 7)', tuple(dispatch := _deep_ep(h, c.model.moe))),
    Table('Routing on RoCE (Figure 8)', tuple(gather := _routing(h))),
  ]
  charts = (Chart('Figure 7', lambda axes: _bars(axes, dispatch)),) if dispatch else ()
  charts += (Chart('Figure 8', lambda axes: _bars(axes, gather)),) if gather else ()
  return Section('Traffic', text, tuple(t for t in tables if t.rows), charts)


def _cannot(h: Hardware) -> str | None:
  """Why nodes of this machine do not go on rails of a switch; None where they do."""
  if h.chips > RADIX or RADIX % h.chips:
    return f'{h.chips} rails do not divide {RADIX} leaves'
  if h.chips > min(SIZES):
    return f'{min(SIZES)} chips are not two groups of {h.chips}'
  return None


def _not_simulated(title: str, h: Hardware, reason: str) -> Section:
  text = (
    f'Planes and rails are simulated for machines of a few chips on fast links; {h.name} is none.'
  )
  return Section(title, text, (Table('Not simulated', (Row('because', reason),)),))


def _fabrics(h: Hardware) -> tuple[Fabric, Fabric]:
  make = (fabric.mpft, fabric.mrft)
  return tuple(f(RADIX, h.chips, h.slow.nominal, h.fast.achieved) for f in make)


def _sizes(h: Hardware, moe: config.Moe) -> list[int]:
  """Chips that can have equally many experts each."""
  return [n for n in SIZES if moe.num_experts % n == 0 and n % h.chips == 0]


def _all_to_all(h: Hardware) -> list[Row]:
  """Planes, rails, and rails that do not forward; these cross the spines, where there is room enough."""
  planes, rails = _fabrics(h)
  rows = []
  for gpus in SIZES:
    run = lambda f, gpus=gpus, **how: flows.all_to_all(
      f, f.leaf_nodes(gpus // h.chips), _SIZE, **how
    )
    own = run(planes)
    ways = {
      'MPFT': own,
      'MRFT': run(rails),
      'MRFT by spines': run(rails, forward=False),
      'MRFT by spines, ECMP': run(rails, forward=False, routing='ecmp'),
    }
    for name, found in ways.items():
      apart = round((found.bandwidth / own.bandwidth - 1) * 100, 2) + 0.0  # no -0
      note = (
        f'{apart:+.2f} % of MPFT; fullest switch link busy {found.busiest * 100:.0f} % of the time'
      )
      rows.append(Row(f'{gpus} GPUs, {name}', found.bandwidth / _GIGA, 'GB/s', note=note))
  return rows


def _deep_ep(h: Hardware, moe: config.Moe) -> list[Row]:
  """FP8 out and BF16 back of 4,096 tokens a GPU, logical GB/s as DeepEP prints them; measured ones of V3 on H800."""
  f = fabric.mpft(RADIX, h.chips, h.slow.achieved, h.fast.achieved)
  measured = h.name == 'h800' and (moe.num_experts, moe.top_k, moe.top_groups) == (256, 8, 4)
  rows = []
  for gpus in _sizes(h, moe):
    nodes = f.leaf_nodes(gpus // h.chips)
    on_node, on_gpu = flows.expected_spread(moe, len(nodes), h.chips)
    by_nic = on_node * (len(nodes) - 1) / h.slow.achieved
    limit = h.slow.name if by_nic > on_gpu * gpus / h.fast.achieved else h.fast.name
    note = f'{on_node * len(nodes):.2f} nodes, {on_gpu * gpus:.2f} GPUs a token; {limit} limits'
    for what, row, given in zip(
      ('dispatch', 'combine'), (7168, 14336), FIGURE_7[gpus], strict=True
    ):
      found = flows.expert_dispatch(f, nodes, moe, row=row).bandwidth / _GIGA
      apart = f'{(found / float(given) - 1) * 100:+.0f} %; ' if measured else ''
      rows.append(
        Row(f'{what}, {gpus} GPUs', found, 'GB/s', given if measured else None, apart + note)
      )
  return rows


def _routing(h: Hardware, seeds: int = 50) -> list[Row]:
  """All-gather of data-parallel groups: by ECMP, mean over `seeds` hashes, by adaptive and static routing.

  With nodes at fewer leaves a ring crosses the spines less often, and ECMP loses less.
  """
  if h.chips != 8:
    return []
  f = fabric.fat_tree(ROCE_RADIX, h.chips, h.slow.nominal, h.fast.achieved)
  nodes = f.leaf_nodes(16, 4)
  rows = []
  for tp, (ecmp, adaptive) in FIGURE_8.items():
    run = lambda how, seed=0, tp=tp: (
      flows.all_gather(f, nodes, _SIZE, tensor_parallel=tp, routing=how, seed=seed).bandwidth
    )
    found = {
      'ECMP': float(np.mean([run('ecmp', seed) for seed in range(seeds)])),
      'adaptive': run('adaptive'),
      'static': run('static'),
    }
    for how, bandwidth in found.items():
      given = ecmp if how == 'ECMP' else adaptive
      ratio, printed = bandwidth / found['adaptive'], float(given) / float(adaptive)
      note = f'{ratio:.2f} of adaptive, in the plot {printed:.2f}'
      rows.append(Row(f'TP {tp}, {how}', bandwidth / _GIGA, 'GB/s', given, note))
  return rows


def _bars(axes: Axes, rows: list[Row]) -> None:
  """Simulated beside measured."""
  place = np.arange(len(rows))
  axes.barh(place + 0.2, [row.value for row in rows], 0.4, label='simulated')
  if all(row.published for row in rows):
    axes.barh(place - 0.2, [float(row.published) for row in rows], 0.4, label='measured')
  axes.set_yticks(place, [row.label for row in rows])
  axes.invert_yaxis()
  axes.set_xlim(right=1.4 * max(row.value for row in rows))  # room for the legend
  axes.set_xlabel('GB/s')
  axes.legend()


# ---- failures ------------------------------------------------------------------------------------


def failures(c: config.Config, h: Hardware, gpus: int = 128) -> Section:
  """Times of an all-to-all and of a dispatch with something lost, over the times with everything whole."""
  if (reason := _cannot(h)) is not None:
    return _not_simulated('Failures', h, reason)
  dispatches = gpus in _sizes(h, c.model.moe)
  rows = []
  for f in _fabrics(h):
    nodes = f.leaf_nodes(gpus // h.chips, 2)
    leaf = f.switch_NP[nodes[0], 0]
    spine = int(np.flatnonzero(f.graph_SS[leaf])[0])

    def run(g: Fabric, nodes: np.ndarray = nodes) -> list[flows.Result]:
      dispatch = [flows.expert_dispatch(g, nodes, c.model.moe)] if dispatches else []
      return [flows.all_to_all(g, nodes, _SIZE), *dispatch]

    whole = run(f)
    lost = {
      'a plane' if f.name == 'MPFT' else 'a rail': f.without_plane(0),
      'a leaf switch': f.without_switch(leaf),
      'a spine switch': f.without_switch(spine),
      'the cable of a NIC': f.without_nic(nodes[0], 0),
      'a cable from leaf to spine': f.without_link(leaf, spine),
    }
    for name, broken in lost.items():
      slow = [a.seconds / b.seconds for a, b in zip(run(broken), whole, strict=True)]
      note = f'dispatch to experts {slow[1]:.2f} x' if dispatches else ''
      rows.append(Row(f'{f.name} without {name}', slow[0], 'x', note=note))
  text = (
    f'An all-to-all on {gpus} GPUs, half of the nodes at one leaf and half at another, routed around what '
    'is gone: to another NIC of the node by NVLink, over other spines. Everything arrives; the time '
    'is that of the whole network times the factor. Who loses a NIC has one less, and all wait for it. '
    'Half a leaf leaves its cables to the spines mostly idle, so that one of them is not missed.'
  )
  return Section('Failures', text, (Table('Slowdown, adaptive routing', tuple(rows)),))


# ---- latency -------------------------------------------------------------------------------------


def latencies(c: config.Config, h: Hardware, tokens: int = 128) -> Section:
  """Table 5 and three layers of switches; a decode step's messages, sent by GPUs or through a CPU thread."""
  rows = []
  for name, printed in latency.TABLE_5.items():
    net = latency.network(name)
    paths = latency.PATHS if printed[1] is not None else {'one NVSwitch': 1}
    for path, switches, given in zip(paths, paths.values(), (*printed, None), strict=False):
      us = net.one_way(switches, 64, h.slow.nominal)
      rows.append(Row(f'{name}, {path}', us, 'us', None if given is None else str(given)))
  tables = (
    Table('64 bytes, end to end (Table 5)', tuple(rows)),
    Table(f'Dispatch of {tokens} tokens a GPU, then combine', tuple(_senders(c, h, tokens))),
  )
  text = (
    'Table 5 as two ends and so many switches: 0.45 us a switch of InfiniBand, 1.0 us of RoCE, cable '
    'included. A decode step sends each token to its experts as a message of its own. A thread of the CPU '
    'posts them one by one, a GPU from many threads (IBGDA); the paper gives no figure for the '
    'thread, so its speed is assumed. By GPUs the time is that of the low-latency kernels of DeepEP.'
  )
  return Section('Latency', text, tables, (_by_size(h),))


def _senders(c: config.Config, h: Hardware, tokens: int) -> list[Row]:
  net, across, proxy = latency.network('InfiniBand'), latency.PATHS['cross leaf'], latency.Proxy()
  dim, top_k = c.model.dim, c.model.moe.top_k
  measured = h.name == 'h800' and (top_k, dim, tokens) == (8, 7168, 128)
  rows = []
  ways = ('dispatch', dim + dim / 32), ('combine', 2.0 * dim)
  for (what, row), given in zip(ways, latency.DEEPEP_LOW_LATENCY[128], strict=True):
    by_gpu, by_cpu = (
      latency.burst(net, across, tokens * top_k, row, h.slow.achieved, sender=sender)
      for sender in latency.SENDERS
    )
    note = 'measured on 128 GPUs by DeepEP' if measured else ''
    rows.append(Row(f'{what}, sent by GPUs', by_gpu, 'us', str(given) if measured else None, note))
    assumed = f'assumed: a thread posts a message in {proxy.each} us'
    rows.append(Row(f'{what}, through the CPU', by_cpu, 'us', note=assumed))
  kilobytes = latency.break_even(h.slow.achieved) / 1e3
  note = 'under the same assumption'
  rows.append(Row('below this size a thread is the limit', kilobytes, 'kB', note=note))
  return rows


def _by_size(h: Hardware) -> Chart:
  """Microseconds of 1,024 messages over their size."""

  def draw(axes: Axes) -> None:
    net, across = latency.network('InfiniBand'), latency.PATHS['cross leaf']
    size = np.geomspace(64, 1 << 20, 60)
    for sender, name in zip(latency.SENDERS, ('by the GPU', 'through a CPU thread'), strict=True):
      us = [latency.burst(net, across, 1024, x, h.slow.achieved, sender=sender) for x in size]
      axes.plot(size, us, label=name)
    axes.set(xscale='log', yscale='log', xlabel='bytes of a message', ylabel='us')
    axes.legend()

  return Chart('1,024 messages of one GPU', draw)
