"""Cost: GPU-hours and dollars of a token budget; Table 4 of arXiv 2505.09343 from the time of a step.

Table 4 counts the FLOPs of Table 2 (main model, no router, no MTP) against the BF16 peak, once with
attention over the lower triangle and once over the full square:

  tokens a day = batch x 86,400 / step     FLOP/s = FLOPs a token x batch / step / GPUs     MFU = FLOP/s / peak
"""

import dataclasses

import numpy as np
from matplotlib.axes import Axes

from dsv3_jax import config, counts
from dsv3_jax.codesign import models
from dsv3_jax.codesign.hardware import H800, Hardware
from dsv3_jax.codesign.table import Chart, Row, Section, Table

GPUS = 2048
DAY = 86_400


@dataclasses.dataclass(frozen=True)
class Step:
  """A training step that took so many seconds."""

  seconds: float
  tokens: int
  flops: float  # a token, causal
  flops_square: float  # a token, over all keys
  devices: int

  @property
  def tokens_a_day(self) -> float:
    return self.tokens * DAY / self.seconds

  def rate(self, flops: float) -> float:
    """FLOP/s of one device."""
    return flops * self.tokens / self.seconds / self.devices


def step(
  m: config.Model, seconds: float, *, seq_len: int, sequences: int, devices: int = GPUS
) -> Step:
  if min(seconds, devices) <= 0:
    raise ValueError(f'{seconds} s on {devices} devices: both must be above 0')
  flops = counts.training_flops_per_token
  square = flops(m, seq_len, causal=False)
  return Step(seconds, seq_len * sequences, flops(m, seq_len), square, devices)


def device_hours(c: config.Config, hardware: Hardware, mfu: float, *, devices: int = 1) -> float:
  """Of all devices, for the config's token budget at that part of the BF16 peak (causal)."""
  if not 0 < mfu <= 1:
    raise ValueError(f'mfu = {mfu}: must be above 0 and at most 1')
  flops = counts.training_flops_per_token(c.model, c.batch.seq_len) * c.run.total_tokens
  return flops / (mfu * hardware.chip.bf16) / 3600 / devices


# Table 4: seconds of each network, and of the parts that it prints.
PARTS = ('1F', 'bubble', '1B', '1W', '1F1B', 'optimizer')
TABLE_4 = {
  'MPFT': (19.926, (1.13, 2.06, 1.99, 0.48, 13.95, 0.29), '272.80'),
  'MRFT': (19.946, (1.13, 2.03, 1.99, 0.48, 14.00, 0.31), '272.52'),
}
_RATES = {'MPFT': ('385', '432', '38.94', '43.73'), 'MRFT': ('385', '432', '38.90', '43.68')}


def section(c: config.Config, hardware: Hardware) -> Section:
  price = hardware.host.price
  paper = step(models.V3, TABLE_4['MPFT'][0], seq_len=4096, sequences=15_360)
  reached = paper.rate(paper.flops) / H800.chip.bf16
  hours = device_hours(c, hardware, reached)
  own = (
    Row(f'{hardware.chip.name}-hours', hours / 1e3, 'thousand', note=f'{100 * reached:.2f} % MFU'),
    Row(f'at {price:g} $ an hour', hours * price / 1e6, 'M$'),
    Row(f'days on {GPUS:,}', hours / GPUS / 24, 'days'),
  )

  def draw(axes: Axes) -> None:
    mfus = np.linspace(0.15, 0.6, 46)
    for dollars in (0.5 * price, price, 1.5 * price, 2 * price):
      million = [device_hours(c, hardware, mfu) * dollars / 1e6 for mfu in mfus]
      axes.plot(100 * mfus, million, label=f'{dollars:g} $ an hour')
    axes.axvline(100 * reached, color='black', linestyle=':', linewidth=1)
    axes.set(xlabel='MFU, %', ylabel='M$', ylim=0)
    axes.legend(fontsize=8)

  sensitivity = tuple(
    Row(
      f'{100 * mfu:.0f} % MFU at {dollars:g} $',
      device_hours(c, hardware, mfu) * dollars / 1e6,
      'M$',
    )
    for mfu in (0.3, 0.4, 0.5)
    for dollars in (0.5 * price, price, 2 * price)
  )
  return Section(
    'Cost',
    'What 14.8T tokens cost follows from the time of a step, and that from FLOPs and the share of the peak '
    'that is reached. Research and ablations are not in the published cost.',
    (
      _table_1(paper),
      _table_4(),
      Table(f'This config, {c.run.total_tokens / 1e12:.3g}T tokens on {hardware.name}', own),
      Table('What it depends on', sensitivity),
    ),
    (Chart('Cost of the token budget', draw),),
  )


def _table_1(paper: Step) -> Table:
  """Table 1 of arXiv 2412.19437; pre-training from its 180K hours a trillion tokens."""
  hours = {'pre-training': 180 * 14.8, 'context extension': 119, 'post-training': 5}
  dollars = {'pre-training': '5.328', 'context extension': '0.238', 'post-training': '0.01'}
  printed = {'pre-training': '2664', 'context extension': '119', 'post-training': '5'}
  rows = []
  for name, thousand in hours.items():
    note = '180K hours a trillion tokens' if name == 'pre-training' else 'taken as printed'
    rows.append(Row(name, float(thousand), 'thousand hours', printed[name], note))
    rows.append(Row(f'{name}: cost', 2 * thousand / 1e3, 'M$', dollars[name]))
  total = sum(hours.values())
  rows += [
    Row('together', total, 'thousand hours', '2788'),
    Row('together: cost', 2 * total / 1e3, 'M$', '5.576'),
    Row('a trillion tokens on 2,048', 180e3 / GPUS / 24, 'days', '3.7'),
    Row('14.8T tokens on 2,048', 180e3 * 14.8 / GPUS / 24, 'days', note='less than two months'),
    Row('14.8T tokens by Table 4', 14.8e12 / paper.tokens_a_day, 'days'),
    Row(
      '14.8T tokens by Table 4: hours', 14.8e9 / paper.tokens_a_day * GPUS * 24, 'thousand hours'
    ),
  ]
  return Table('Table 1: H800 hours at 2 $', tuple(rows))


def _table_4() -> Table:
  rows = []
  for name, (seconds, parts, a_day) in TABLE_4.items():
    s = step(models.V3, seconds, seq_len=4096, sequences=15_360)
    causal, square = s.rate(s.flops), s.rate(s.flops_square)
    rates = _RATES[name]
    rows += [
      Row(f'{name}: tokens a day', s.tokens_a_day / 1e9, 'billion', a_day),
      Row(f'{name}: causal', causal / 1e12, 'TFLOP/s', rates[0]),
      Row(f'{name}: not causal', square / 1e12, 'TFLOP/s', rates[1]),
      Row(f'{name}: causal MFU', 100 * causal / H800.chip.bf16, '%', rates[2]),
      Row(f'{name}: not causal MFU', 100 * square / H800.chip.bf16, '%', rates[3]),
      Row(f'{name}: sum of the parts', sum(parts), 's', note=f'of {seconds} s: {", ".join(PARTS)}'),
    ]
  return Table('Table 4: columns that follow from the time of a step', tuple(rows))
