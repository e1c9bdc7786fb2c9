"""How fast one user can be served with experts on many devices: links alone, then what stands beside them.

arXiv 2505.09343, 2.3.2: a token goes to K routed experts and the shared one, a byte a value out (FP8) and
two back (BF16). With two micro-batches out of step one exchanges while the other computes, so a layer
takes two exchanges where compute is free:

  exchange = (1 + 2) B x 32 tokens x 9 experts x 7,000 values / 50 GB/s = 120.96 us
  token    = 2 x 61 layers x 120.96 us = 14.76 ms, 67 a second

The paper's "7K" is 7,000: the model's 7,168 values give 123.86 us and 15.11 ms. No latency, no compute.
"""

import dataclasses

from matplotlib.axes import Axes

from dsv3_jax import config, counts
from dsv3_jax.codesign import compute, latency, models
from dsv3_jax.codesign.hardware import GB200, H800, Hardware
from dsv3_jax.codesign.table import Chart, Row, Section, Table

CONTEXT = 4989  # tokens: mean of DeepSeek's service in February 2025 (open-infra-index, day 6)
ACCEPTANCE = 0.85  # of the second token: 85 to 90 % (2412.19437, 5.4.3)


@dataclasses.dataclass(frozen=True)
class Exchange:
  """Dispatch and combine of one micro-batch of one device in one layer."""

  tokens: int
  experts: int  # copies of a token that are sent: K and the shared one
  values: int  # of a token
  dispatch: float = 1.0  # bytes a value
  combine: float = 2.0

  def seconds(self, bandwidth: float) -> float:
    each = self.tokens * self.experts * self.values
    return (self.dispatch + self.combine) * each / bandwidth


PAPER = Exchange(32, 9, 7000)


def exchange(m: config.Model, tokens: int = 32) -> Exchange:
  return Exchange(tokens, m.moe.top_k + m.moe.num_shared, m.dim)


def token_seconds(
  layers: int, exchange_s: float, compute_s: float = 0.0, *, overlap: bool = True
) -> float:
  """Of one token in all layers, with two micro-batches: the longer of the two, twice; without overlap both."""
  return 2 * layers * (max(exchange_s, compute_s) if overlap else exchange_s + compute_s)


def tokens_a_step(acceptance: float, drafts: int = 1) -> float:
  """Tokens that a step yields, its own and the drafts accepted in a row; in [0, 1] or ValueError."""
  if not 0 <= acceptance <= 1:
    raise ValueError(f'acceptance = {acceptance}: must be between 0 and 1')
  return sum(acceptance**k for k in range(drafts + 1))


def latency_seconds(hardware: Hardware, devices: int) -> float:
  """Of a dispatch and a combine, where the links are of Table 5; else 0."""
  name = hardware.exchange(devices).name
  if name not in latency.TABLE_5:
    return 0.0
  same, cross = latency.TABLE_5[name]
  return 2e-6 * (cross or same)


def unit(m: config.Model, hardware: Hardware) -> int:
  """Devices that serve together: the fast network's where four experts or fewer fill each, else one each."""
  experts = m.moe.num_experts
  return min(experts, hardware.chips) if 4 * hardware.chips >= experts else experts


@dataclasses.dataclass(frozen=True)
class Deployment:
  """A unit that serves together (2412.19437, 3.4; open-infra-index, day 6)."""

  name: str
  devices: int
  redundant: int  # copies of experts beyond one each
  shared: bool  # whether every device holds the shared expert too
  spare: int = 0  # devices that hold copies, and the shared expert, alone

  def slots(self, experts: int) -> float:
    """Routed experts on a device."""
    return (experts + self.redundant) / (self.devices - self.spare)


DEPLOYMENTS = (
  Deployment('prefill, report', 32, 32, True),
  Deployment('decode, report', 320, 0, False, spare=64),
  Deployment('prefill, online', 32, 32, True),
  Deployment('decode, online', 144, 32, True),
)
_PRINTED_SLOTS = ('9', '1', '9', '2')


def section(c: config.Config, hardware: Hardware) -> Section:
  m = c.model
  devices = unit(m, hardware)
  links = hardware.exchange(devices)
  own = exchange(m)
  once = own.seconds(links.nominal)
  work = compute.decode_seconds(m, hardware, tokens=32, context=CONTEXT, devices=devices)
  wait = latency_seconds(hardware, devices)
  layers = m.num_layers
  ways = (
    ('links alone', token_seconds(layers, once)),
    ('links at the bandwidth achieved', token_seconds(layers, own.seconds(links.achieved))),
    ('and latency of Table 5', token_seconds(layers, own.seconds(links.achieved) + wait)),
    (
      'and compute, overlapped',
      token_seconds(layers, own.seconds(links.achieved) + wait, work),
    ),
    (
      'and compute, one after the other',
      token_seconds(layers, own.seconds(links.achieved) + wait, work, overlap=False),
    ),
  )
  title = f'This config on {devices} {hardware.chip.name}: 2 x 32 tokens a device, {links.name}'
  note = f'{1e6 * work:.1f} us a layer beside {1e6 * once:.1f} us of links'
  rows = [Row('dispatch and combine', 1e6 * once, 'us')]
  for name, seconds in ways:
    rows.append(Row(name, 1e3 * seconds, 'ms a token', note=note if 'overlapped' in name else ''))
    rows.append(Row(f'{name}: speed', 1 / seconds, 'tokens/s'))
  drafted = tokens_a_step(ACCEPTANCE) / ways[3][1]
  rows.append(
    Row(
      f'overlapped, MTP, {100 * ACCEPTANCE:.0f} % accepted',
      drafted,
      'tokens/s',
      note='two tokens of each of half as many users; drafting itself not counted',
    )
  )

  def draw(axes: Axes) -> None:
    names = ['links', 'achieved', '+ latency', '+ compute', 'no overlap']
    speeds = [1 / seconds for _, seconds in ways]
    axes.bar(names, speeds, color='#2f6db5')
    for i, speed in enumerate(speeds):
      axes.text(i, speed, f'{speed:,.0f}', ha='center', va='bottom')
    axes.set(ylabel='tokens/s of a user')
    axes.tick_params(axis='x', labelsize=8)

  return Section(
    'Limit of decoding',
    'Each token passes two exchanges a layer. However fast the chips, the links set how fast one user can '
    'be answered; MTP multiplies it by the tokens accepted.',
    (_paper(), Table(title, tuple(rows)), _deployments(m, hardware)),
    (Chart(f'Decode on {hardware.name}', draw),),
  )


def _paper() -> Table:
  rows = []
  printed = (
    (H800, '120.96', '14.76', '67', '1', 'tokens/s', ''),
    (GB200, '6.72', '0.82', '1.2', '1e3', 'thousand tokens/s', ''),
  )
  for hardware, us, ms, speed, scale, unit, note in printed:
    links = hardware.fast if hardware is GB200 else hardware.slow
    once = PAPER.seconds(links.nominal)
    token = token_seconds(models.V3.num_layers, once)
    at = f'{hardware.name}, {links.nominal / 1e9:.0f} GB/s'
    rows += [
      Row(f'{at}: dispatch and combine', 1e6 * once, 'us', us),
      Row(f'{at}: a token', 1e3 * token, 'ms', ms),
      Row(f'{at}: speed', 1 / token / float(scale), unit, speed, note),
    ]
  exact = dataclasses.replace(PAPER, values=7168).seconds(50e9)
  rows.append(Row('with 7,168 values', 1e6 * exact, 'us', note="the paper's 7K is 7,000"))
  rows.append(Row('with 7,168 values: a token', 1e3 * token_seconds(61, exact), 'ms'))
  rows.append(
    Row('MTP, 80 % accepted', tokens_a_step(0.8), 'times', '1.8', '80 to 90 %: 1.8 to 1.9')
  )
  return Table("The paper's limit, 32 tokens a device", tuple(rows))


def _deployments(m: config.Model, hardware: Hardware) -> Table:
  rows = []
  for d, printed in zip(DEPLOYMENTS, _PRINTED_SLOTS, strict=True):
    slots = d.slots(m.moe.num_experts)
    published = printed if m.moe.num_experts == models.V3.moe.num_experts else None
    rows.append(Row(f'{d.name}: {d.devices} devices', slots, 'routed experts a device', published))
    held = slots + (m.moe.num_shared if d.shared else 0)
    size = memory_bytes(m, held)
    note = (
      '' if size < hardware.chip.memory else f'does not fit {hardware.chip.memory / 1e9:.0f} GB'
    )
    rows.append(Row(f'{d.name}: weights, FP8', size / 1e9, 'GB a device', note=note))
  return Table('Units of deployment', tuple(rows))


def memory_bytes(m: config.Model, experts: float) -> float:
  """FP8 weights of a device with so many experts in each MoE layer, all else whole; embeddings in BF16."""
  moe_layers = m.num_layers - m.num_dense_layers
  inside = moe_layers * experts * counts.expert_parameters(m)
  dense = m.num_dense_layers * counts.ffn_parameters(m)
  attention = m.num_layers * counts.attention_parameters(m)
  return inside + dense + attention + 2 * 2 * counts.embedding_parameters(m)
