"""The hardware that arXiv 2505.09343 asks for, where it carries a number: each a switch on two bounds.

| bound         | is                                                                                 |
|---------------|------------------------------------------------------------------------------------|
| decode        | time of a token: links alone, two micro-batches, as in `decode_limit`               |
| training step | the longer of compute and exchange in its overlapped part, and the rest beside them |

A step's compute is its FLOPs at the MFU of Table 4; 70 % of it is in the overlapped part (13.95 of 19.93 s).
A switch changes a `Setting`; the same two functions then say what it is worth.
"""

import dataclasses
from collections.abc import Callable

from matplotlib.axes import Axes

from dsv3_jax import config, counts
from dsv3_jax.codesign import compute, cost, decode_limit, models
from dsv3_jax.codesign.expert_traffic import row_bytes
from dsv3_jax.codesign.hardware import H800, Hardware
from dsv3_jax.codesign.table import Chart, Row, Section, Table

_OVERLAPPED = 13.95 / 19.926
_SMS, _SMS_OF_EXCHANGE = 132, 20  # of an H800 (2412.19437, 3.2.2)
_DEVICES = 2048


@dataclasses.dataclass(frozen=True)
class Setting:
  """What the switches change."""

  bandwidth: float  # bytes/s of a device between nodes
  decode_bandwidth: float  # and in decode
  dispatch: float = 1.0  # bytes a value
  combine: float = 2.0
  multicast: bool = False  # the network copies rows out and adds rows back
  compute: float = 1.0  # times the speed of compute beside an exchange
  memory: float = 1.0  # times the memory bandwidth


@dataclasses.dataclass(frozen=True)
class Switch:
  name: str
  assumption: str
  change: Callable[[Setting, config.Config, Hardware], Setting]


def setting(c: config.Config, hardware: Hardware) -> Setting:
  links = hardware.exchange(decode_limit.unit(c.model, hardware))
  ep = min(64, c.model.moe.num_experts)
  return Setting(hardware.exchange(ep).nominal, links.nominal)


def _logfmt(s: Setting, c: config.Config, hardware: Hardware) -> Setting:
  return dataclasses.replace(s, combine=row_bytes('logfmt10', c.model.dim) / c.model.dim)


def _one_network(s: Setting, c: config.Config, hardware: Hardware) -> Setting:
  fast = hardware.fast.nominal
  return dataclasses.replace(
    s, bandwidth=max(fast, s.bandwidth), decode_bandwidth=max(fast, s.decode_bandwidth)
  )


def _no_sms(s: Setting, c: config.Config, hardware: Hardware) -> Setting:
  return dataclasses.replace(s, compute=s.compute * _SMS / (_SMS - _SMS_OF_EXCHANGE))


SWITCHES = (
  Switch(
    'multicast and reduction in the network',
    'a row is sent once and copied by switches, sums come back as one row; out and back of two '
    'micro-batches run at once, so the fuller direction of a port counts',
    lambda s, c, h: dataclasses.replace(s, multicast=True),
  ),
  Switch('LogFMT in the NIC', '10 bits back, coded at line rate: no compute for it', _logfmt),
  Switch(
    'one network for scale-up and scale-out',
    'every device reaches every other at the speed of the fast links',
    _one_network,
  ),
  Switch(
    'exchange without SMs',
    f'{_SMS_OF_EXCHANGE} of {_SMS} SMs go back to compute in the overlapped part; decode uses none',
    _no_sms,
  ),
  Switch(
    'ordered multi-plane NICs',
    'one message may use all planes: an exchange of many messages fills them anyway',
    lambda s, c, h: s,
  ),
  Switch(
    'wider accumulators',
    'promotion every 128 products is gone; kernels hide it today, so accuracy is gained and no time',
    lambda s, c, h: s,
  ),
  Switch(
    'stacked memory',
    '4 times the bandwidth: shown on the compute beside the links',
    lambda s, c, h: dataclasses.replace(s, memory=4.0),
  ),
)


def exchange_values(s: Setting, rows: float) -> float:
  """Bytes a value that pass the fuller direction of a port, for a token sent as so many rows."""
  if not s.multicast:
    return rows * (s.dispatch + s.combine)
  out = s.dispatch + rows * s.combine  # one copy out, `rows` results on their way back
  into = rows * s.dispatch + s.combine
  return max(out, into)


def decode_seconds(c: config.Config, s: Setting) -> float:
  """Of a token, by links alone."""
  e = decode_limit.exchange(c.model)
  once = e.tokens * e.values * exchange_values(s, e.experts) / s.decode_bandwidth
  return decode_limit.token_seconds(c.model.num_layers, once)


def step_seconds(c: config.Config, hardware: Hardware, s: Setting) -> tuple[float, float]:
  """Of a training step on 2,048 devices, and of the exchanges in it."""
  m = c.model
  paper = cost.step(models.V3, cost.TABLE_4['MPFT'][0], seq_len=4096, sequences=15_360)
  mfu = paper.rate(paper.flops) / H800.chip.bf16
  tokens = c.batch.size * c.batch.seq_len
  flops = counts.training_flops_per_token(m, c.batch.seq_len)
  worked = flops * tokens / _DEVICES / (mfu * hardware.chip.bf16)
  nodes = min(m.moe.top_groups, m.moe.top_k)
  rows = nodes * (1 - 1 / m.moe.num_groups)  # of a token's nodes, those that are not its own
  passes = tokens / _DEVICES * (m.num_layers - m.num_dense_layers)
  exchanged = 2 * passes * m.dim * exchange_values(s, rows) / s.bandwidth
  return max(_OVERLAPPED * worked / s.compute, exchanged) + (1 - _OVERLAPPED) * worked, exchanged


def section(c: config.Config, hardware: Hardware) -> Section:
  start = setting(c, hardware)
  today_decode = decode_seconds(c, start)
  today_step, exchanged = step_seconds(c, hardware, start)
  rows = [
    Row('today: decode', 1e3 * today_decode, 'ms a token'),
    Row(
      'today: training step', today_step, 's', note=f'{exchanged:.2f} s of exchanges beside compute'
    ),
  ]
  gains = []
  for switch in SWITCHES:
    s = switch.change(start, c, hardware)
    decode, (trained, sent) = decode_seconds(c, s), step_seconds(c, hardware, s)
    note = switch.assumption
    if s.memory != 1:
      note += f': {_beside(c, hardware, s.memory)}'
    rows.append(Row(f'{switch.name}: decode', 1e3 * decode, 'ms a token', note=note))
    rows.append(Row(f'{switch.name}: training step', trained, 's', note=f'exchanges {sent:.2f} s'))
    gains.append((switch.name, today_decode / decode, today_step / trained))

  def draw(axes: Axes) -> None:
    at = range(len(gains))
    axes.barh([i - 0.2 for i in at], [d for _, d, _ in gains], 0.38, label='decode')
    axes.barh([i + 0.2 for i in at], [t for *_, t in gains], 0.38, label='training step')
    axes.set_yticks(at, [name for name, *_ in gains], fontsize=8)
    axes.axvline(1, color='black', linewidth=0.8)
    axes.invert_yaxis()
    axes.set(xlabel='times as fast as today')
    axes.legend(fontsize=8)

  return Section(
    'What if',
    "Each of the paper's wishes that carries a number, alone: what it would do to the bound of decoding "
    'and to the training step on 2,048 devices.',
    (Table('One switch at a time', tuple(rows)),),
    (Chart('What each would be worth', draw, height=3.4),),
  )


def _beside(c: config.Config, hardware: Hardware, times: float) -> str:
  """Compute of a layer in decode, now and with so much memory bandwidth."""
  chip = hardware.chip
  faster = dataclasses.replace(chip, memory_bandwidth=times * chip.memory_bandwidth)
  devices = decode_limit.unit(c.model, hardware)
  us = [
    1e6 * compute.decode_seconds(
      c.model, dataclasses.replace(hardware, chip=x), tokens=32, context=decode_limit.CONTEXT,
      devices=devices,
    )
    for x in (chip, faster)
  ]  # fmt: skip
  return f'{us[0]:.0f} us a layer become {us[1]:.0f}'
