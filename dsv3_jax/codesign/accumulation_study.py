"""Section on FP8 accumulation: error over the length of a sum, with and without promotion, and by width."""

import functools

from matplotlib.axes import Axes

from dsv3_jax import config
from dsv3_jax.codesign import accumulation
from dsv3_jax.codesign.hardware import Hardware
from dsv3_jax.codesign.table import Chart, Row, Section, Table

LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
WIDTHS = (10, 13, 16, 19, 23)  # fraction bits; 23 is FP32
_OUTPUTS = 128
_PROMOTE = accumulation.PROMOTE
_WHAT = {
  'normal': 'normal',
  'uniform': 'uniform in [0, 1): sums only grow',
  'outliers': 'normal, each 100th channel x 100',
}


def section(c: config.Config, h: Hardware) -> Section:
  """Of E4M3 operands over the sums of `LENGTHS` products; those of the model's own matmuls in the table."""
  del h
  text = (
    'A model of Hopper: 32 products and the register aligned to the largest and cut to 13 fraction bits, a '
    'register of 22 bits (2505.09343, 3.1; 2412.19437, 3.3.2), promoted to FP32 every 128 products or '
    'never. Error against exact sums of the same E4M3 operands, relative in the Euclidean norm. Sums of one '
    'sign show most; random signs hide it.'
  )
  inner = sorted({c.model.dim, c.model.moe.expert_dim, c.model.mla.num_heads * c.model.mla.v_dim})
  inner = [k for k in inner if k % _PROMOTE == 0]
  rows = [
    Row(f'{data}, K = {k:,}, {how}', f'{_error(data, k, promote):.1e}')
    for k in inner
    for data in accumulation.DATA
    for how, promote in (('promoted', _PROMOTE), ('not promoted', None))
  ]
  widths = [
    Row(f'{fraction} fraction bits, {how}', f'{_error("uniform", 4096, promote, fraction):.1e}')
    for fraction in WIDTHS
    for how, promote in (('promoted', _PROMOTE), ('not promoted', None))
  ]
  tables = [
    Table('Inner dimensions of this model', tuple(rows)),
    Table('Wider registers, uniform, K = 4,096', tuple(widths)),
  ]
  return Section('Accumulation', text, tuple(t for t in tables if t.rows), (_chart(),))


def _chart() -> Chart:
  curves = {
    (data, promote): [_error(data, k, promote) for k in LENGTHS]
    for data in accumulation.DATA
    for promote in (None, _PROMOTE)
  }

  def draw(axes: Axes) -> None:
    for i, data in enumerate(accumulation.DATA):
      axes.plot(LENGTHS, curves[data, None], color=f'C{i}', label=_WHAT[data])
      axes.plot(LENGTHS, curves[data, _PROMOTE], color=f'C{i}', linestyle='--')
    axes.set(xscale='log', yscale='log', xlabel='products in a sum', ylabel='relative error')
    axes.set_xticks(LENGTHS, LENGTHS, minor=False)
    axes.minorticks_off()
    axes.set_ylim(top=10)  # room for the legend
    axes.legend(title='solid: never promoted; dashed: every 128')

  return Chart('Error over the length of a sum', draw, height=3.6)


@functools.cache
def _error(data: str, k: int, promote: int | None, fraction: int = accumulation.FRACTION) -> float:
  a_NK, b_NK = accumulation.operands(data, _OUTPUTS, k)
  return accumulation.errors(a_NK, b_NK, fraction=fraction, promote=promote)[0]
