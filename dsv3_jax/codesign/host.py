"""What a node's PCIe, fast links and memory can carry, and a cache transfer that shares the way of experts.

arXiv 2505.09343, 4.5 and 6.2: a GPU and its NIC hang on PCIe, and caches that come from CPU memory take
the same lanes into the GPU as tokens that come from the network. Without priorities both get an equal
share of what is short; with them experts get all they ask for, and caches what is left.
"""

import dataclasses

from matplotlib.axes import Axes

from dsv3_jax import config
from dsv3_jax.codesign import decode_limit, memory
from dsv3_jax.codesign.hardware import Hardware
from dsv3_jax.codesign.table import Chart, Row, Section, Table

# Mean of DeepSeek's service in February 2025 (open-infra-index, day 6): tokens in for each token out, and
# tokens out of a decode node of eight in a second.
_INPUT_PER_OUTPUT = 608 / 168
_NODE_OUTPUT = 14.8e3


@dataclasses.dataclass(frozen=True)
class Share:
  """bytes/s that each gets of a bus on which both want to send."""

  experts: float
  caches: float


def share(bus: float, experts: float, *, priority: bool) -> Share:
  """Experts ask for `experts` bytes/s, a cache transfer for all it gets; max-min fair without priority."""
  if bus <= 0 or experts < 0:
    raise ValueError(
      f'bus = {bus}, experts = {experts}: must be above 0, and not negative, bytes/s'
    )
  got = min(experts, bus if priority else bus / 2)
  return Share(got, bus - got)


def section(c: config.Config, hardware: Hardware) -> Section:
  host, links = hardware.host, hardware.slow
  node = min(hardware.chips, 8)
  lanes = 160 * 4e9
  budget = (
    Row('160 lanes of PCIe 5', lanes / 1e9, 'GB/s', '640', 'one way, 4 GB/s a lane (2505.09343)'),
    Row('memory of the host', host.memory_bandwidth / 1e9, 'GB/s', note='about 1 TB/s a node'),
    Row('PCIe of the GPUs', node * host.pcie / 1e9, 'GB/s', note=f'{node} of 16 lanes'),
    Row('NICs', node * links.nominal / 1e9, 'GB/s'),
    Row('fast links', node * hardware.fast.nominal / 1e9, 'GB/s'),
    Row(
      'GPUs at full PCIe, of host memory',
      100 * node * host.pcie / host.memory_bandwidth,
      '%',
      note='read once; a copy through a buffer takes three times as much',
    ),
  )
  prompt = 4096 * memory.latent(c.model).token_bytes()
  asked = links.nominal
  rows = [Row('cache of 4,096 tokens', prompt / 1e6, 'MB')]
  once = decode_limit.exchange(c.model).seconds(asked)
  for name, priority in (('equal shares', False), ('experts first', True)):
    s = share(host.pcie, asked, priority=priority)
    slower = asked / s.experts
    rows += [
      Row(f'{name}: experts', s.experts / 1e9, 'GB/s'),
      Row(f'{name}: an exchange', 1e6 * once * slower, 'us', note=f'{slower:.2f} times as long'),
      Row(
        f'{name}: the cache arrives in',
        1e3 * prompt / s.caches if s.caches else 'never',
        'ms',
      ),
    ]
  duty = _NODE_OUTPUT / 8 * _INPUT_PER_OUTPUT * memory.latent(c.model).token_bytes() / host.pcie
  rows.append(
    Row(
      'part of the time that caches come',
      100 * duty,
      '%',
      note='at the mean of a service; whoever is hit waits for the longest of all devices',
    )
  )
  # A device is hit or not; an exchange over many devices waits for the slowest.
  devices = decode_limit.unit(c.model, hardware)
  hit = 100 * (1 - (1 - min(duty, 1.0)) ** devices)
  rows.append(
    Row(
      f'exchanges of {devices} devices that meet one', hit, '%', note='if they come independently'
    )
  )

  def draw(axes: Axes) -> None:
    loads = [asked * i / 40 for i in range(1, 61)]
    for name, priority in (('equal shares', False), ('experts first', True)):
      got = [share(host.pcie, x, priority=priority).experts / 1e9 for x in loads]
      axes.plot([x / 1e9 for x in loads], got, label=name)
    axes.axvline(asked / 1e9, color='black', linestyle=':', linewidth=1)
    axes.set(xlabel='experts ask for, GB/s', ylabel='experts get, GB/s')
    axes.legend(fontsize=8)

  return Section(
    'Host',
    'Caches from CPU memory and tokens from other nodes enter a GPU by the same lanes.',
    (
      Table(f'Budgets of a node of {node}, one way', budget),
      Table('A cache transfer beside expert traffic', tuple(rows)),
    ),
    (Chart('PCIe shared with a cache transfer', draw),),
  )
