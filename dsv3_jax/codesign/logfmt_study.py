"""What LogFMT loses against FP8 and BF16 on what a combine carries (arXiv 2505.09343, 3.2).

The paper quantises the residual branch of a dense model of 7B and finds LogFMT-8 better than E4M3 and
E5M2, and LogFMT-10 about equal to a BF16 combine; it judges by the trained model. Here the same place is
read in a model of our own (`python -m dsv3_jax.activations`), and the numbers themselves are compared.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
from matplotlib.axes import Axes

from dsv3_jax import config
from dsv3_jax.codesign import formats
from dsv3_jax.codesign.branches import Branches
from dsv3_jax.codesign.formats import E4M3, E5M2, TILE
from dsv3_jax.codesign.hardware import Hardware
from dsv3_jax.codesign.table import Chart, Row, Section, Table


@dataclasses.dataclass(frozen=True)
class Format:
  """Of a combine's rows: bits per number, what a tile's scale or range adds included; there and back."""

  bits: float
  round_trip: Callable[[np.ndarray], np.ndarray]


FORMATS: Mapping[str, Format] = {
  'BF16': Format(16, formats.bf16),
  'LogFMT-10': Format(10 + 32 / TILE, lambda x: formats.logfmt(x, 10)),
  'LogFMT-8': Format(8 + 32 / TILE, lambda x: formats.logfmt(x, 8)),
  'E4M3': Format(8 + 8 / TILE, lambda x: formats.rounded(x, E4M3, power_of_two=True)),
  'E4M3, exact scale': Format(
    8 + 32 / TILE, lambda x: formats.rounded(x, E4M3, power_of_two=False)
  ),
  'E5M2': Format(8 + 8 / TILE, lambda x: formats.rounded(x, E5M2, power_of_two=True)),
}


@dataclasses.dataclass(frozen=True)
class Error:
  """Of one format on some numbers."""

  norm: float  # of the difference over that of the numbers
  median: float  # |difference| over |x|, of what is not 0
  zeroed: float  # share of what is not 0 that becomes 0
  bias: float  # sum of |rounded| - |x| over sum of |x|: what is lost or added on the whole
  worst_tile: float  # largest `norm` of a tile


def error(x_XD: np.ndarray, rounded_XD: np.ndarray) -> Error:
  """Of rounded numbers against float32 ones."""
  x, off = x_XD.astype(np.float64), rounded_XD.astype(np.float64) - x_XD
  some = x != 0
  relative = np.abs(off[some] / x[some])
  size_XS, off_XS = (_tile_norm(a) for a in (x, off))
  tile = np.divide(off_XS, size_XS, out=np.zeros_like(off_XS), where=size_XS > 0)
  return Error(
    norm=float(np.linalg.norm(off) / np.linalg.norm(x)),
    median=float(np.median(relative)),
    zeroed=float(np.mean(rounded_XD[some] == 0)),
    bias=float((np.abs(rounded_XD).sum(dtype=np.float64) - np.abs(x).sum()) / np.abs(x).sum()),
    worst_tile=float(tile.max()),
  )


def errors(values_YTD: np.ndarray) -> dict[str, Error]:
  """Of every format on all layers together."""
  return {name: error(values_YTD, f.round_trip(values_YTD)) for name, f in FORMATS.items()}


def layer_errors(values_YTD: np.ndarray) -> dict[str, list[float]]:
  """`Error.norm` of every format in each layer."""
  return {
    name: [error(x_TD, f.round_trip(x_TD)).norm for x_TD in values_YTD]
    for name, f in FORMATS.items()
  }


def made_up(tokens: int = 256, dim: int = 1024, seed: int = 0) -> np.ndarray:
  """Numbers for a look without a model, [1, T, D]: normal, a hundredth of the channels 20 times as large."""
  rng = np.random.default_rng(seed)
  scale_D = np.where(rng.random(dim) < 0.01, 20, 1)
  return (rng.standard_normal((1, tokens, dim)) * scale_D).astype(np.float32)


def octaves(values_YTD: np.ndarray, edges: np.ndarray) -> np.ndarray:
  """Share of the numbers that are 2^edges[i] to 2^edges[i + 1] times the largest of their tile."""
  x = np.abs(values_YTD)
  amax = formats.tile_max(x)
  some = x > 0
  return np.histogram(np.log2(x[some] / amax[some]), edges)[0] / some.sum()


def relative_errors(values_YTD: np.ndarray, edges: np.ndarray) -> dict[str, np.ndarray]:
  """Share of the numbers whose log10 of |difference| / |x| lies between two edges, by format."""
  some = values_YTD != 0
  shares = {}
  for name, f in FORMATS.items():
    off = np.abs(f.round_trip(values_YTD)[some] / values_YTD[some].astype(np.float64) - 1)
    shares[name] = np.histogram(np.log10(np.maximum(off, 10.0 ** edges[0])), edges)[0] / some.sum()
  return shares


def _tile_norm(x_XD: np.ndarray) -> np.ndarray:
  """Euclidean norm of every 1x128 tile."""
  starts = np.arange(0, x_XD.shape[-1], TILE)
  return np.sqrt(np.add.reduceat(np.square(x_XD), starts, axis=-1))


# ---- section -------------------------------------------------------------------------------------


def section(c: config.Config, h: Hardware, activations: Branches | None = None) -> Section:
  """Errors and histograms of all formats on recorded activations, or on made-up ones and saying so."""
  del c, h
  if activations is None:
    values_YTD = made_up()
    where = (
      'Made-up numbers, normal, a hundredth of the channels 20 times as large; record a run with '
      'python -m dsv3_jax.activations WORKDIR --out=FILE and give the file as --activations. '
    )
  else:
    values_YTD = activations.values_YTD
    layers, tokens, dim = values_YTD.shape
    where = f'{activations.name}: what {layers} FFNs add to the residual for {tokens:,} tokens, {dim} wide. '
  text = where + (
    'In tiles of 1x128, LogFMT with ranges in BF16, FP8 with scales. LogFMT-8 is to be nearer than both '
    'kinds of FP8 (2505.09343, 3.2). The paper finds LogFMT-10 about equal to BF16, judged by the trained '
    'model; the numbers themselves are about twice as far off.'
  )
  found = errors(values_YTD)
  tables = [
    Table('Relative error, Euclidean norm', _column(found, 'norm')),
    Table('Bias of magnitudes', _column(found, 'bias')),
    Table('Share that becomes zero', _column(found, 'zeroed')),
  ]
  layers = layer_errors(values_YTD)
  if len(values_YTD) > 1:
    rows = [
      Row(f'{name}, layer {y}', value)
      for name in ('LogFMT-8', 'E4M3')
      for y, value in enumerate(layers[name])
    ]
    tables.append(Table('By layer', tuple(rows)))
  return Section(
    'LogFMT', text, tuple(tables), (_error_chart(values_YTD), _octave_chart(values_YTD))
  )


def _column(found: dict[str, Error], field: str) -> tuple[Row, ...]:
  note = {name: f'{f.bits:.4g} bits a number' for name, f in FORMATS.items()}
  return tuple(
    Row(name, f'{getattr(e, field):.2e}', note=note[name] if field == 'norm' else '')
    for name, e in found.items()
  )


def _error_chart(values_YTD: np.ndarray) -> Chart:
  edges = np.linspace(-6, 0, 61)
  shares = relative_errors(values_YTD, edges)

  def draw(axes: Axes) -> None:
    for name, share in shares.items():
      if name != 'E4M3, exact scale':
        axes.stairs(share * 100, 10**edges, label=name)
    axes.set(xscale='log', xlabel='|error| / |x|', ylabel='% of the numbers')
    axes.legend()

  return Chart('How far off numbers are', draw)


def _octave_chart(values_YTD: np.ndarray) -> Chart:
  edges = np.arange(-16.0, 1.0)
  shares = octaves(values_YTD, edges)

  def draw(axes: Axes) -> None:
    axes.stairs(shares * 100, edges, fill=True)
    axes.set(xlabel='log2 of |x| over the largest of the tile', ylabel='% of the numbers')

  return Chart('How far tiles reach', draw)
