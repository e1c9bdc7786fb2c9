"""One user at home: tokens a second are at most memory bandwidth over the bytes that a token reads.

arXiv 2505.09343, 2.2.2: a mixture of experts reads the experts chosen, a dense model everything. On a
workstation experts lie in CPU memory and all else on the GPU (KTransformers); a token passes one after the
other, so times add. Weights in 4 bits; scales and the short caches are left out.

MTP verifies two tokens at once. A dense model then reads its weights once for both; of experts the second
token chooses mostly others, so little is saved where they are what is read.
"""

import math

from matplotlib.axes import Axes

from dsv3_jax import config, counts
from dsv3_jax.codesign import models
from dsv3_jax.codesign.decode_limit import ACCEPTANCE
from dsv3_jax.codesign.hardware import AI_PC, M3_ULTRA, RTX_4090, TWO_XEONS, Hardware, Part
from dsv3_jax.codesign.table import Chart, Row, Section, Table

INT4 = 0.5  # bytes a weight


def expert_weights(m: config.Model, tokens: int = 1) -> float:
  """Of the routed experts that so many tokens read, all layers: distinct ones, chosen independently."""
  e = m.moe
  distinct = e.num_experts * (1 - (1 - e.top_k / e.num_experts) ** tokens)
  return (m.num_layers - m.num_dense_layers) * distinct * counts.expert_parameters(m)


def other_weights(m: config.Model) -> float:
  """That every token reads: all but routed experts and the input embedding."""
  return counts.active_parameters(m, embedding=False) - expert_weights(m)


def speed(
  m: config.Model, experts: Part, rest: Part, *, weight: float = INT4, tokens: int = 1
) -> float:
  """Tokens/s at most. With two at once, the second is accepted at ACCEPTANCE.

  Raises:
    ValueError: the weights do not fit where they should lie.
  """
  routed = (m.num_layers - m.num_dense_layers) * m.moe.num_experts * counts.expert_parameters(m)
  held = {experts: weight * routed}
  held[rest] = held.get(rest, 0.0) + weight * (counts.parameters(m) - routed)
  for part, size in held.items():
    if size > part.memory:
      raise ValueError(
        f'{part.name}: {size / 1e9:.0f} GB of weights do not fit {part.memory / 1e9:.0f} GB'
      )
  read = expert_weights(m, tokens) / experts.bandwidth + other_weights(m) / rest.bandwidth
  return (1 + ACCEPTANCE * (tokens - 1)) / (weight * read)


def dense_speed(parameters: float, part: Part, *, weight: float = INT4, tokens: int = 1) -> float:
  """As `speed`, of a model that reads all its weights."""
  if weight * parameters > part.memory:
    raise ValueError(f'{part.name}: {weight * parameters / 1e9:.0f} GB of weights do not fit')
  return (1 + ACCEPTANCE * (tokens - 1)) * part.bandwidth / (weight * parameters)


def section(c: config.Config, hardware: Hardware) -> Section:
  del hardware  # what stands at home is another
  v2, v3, dense = models.V2, models.V3, models.QWEN_72B.matmul_parameters
  paper = (
    (
      f'V2 on a {AI_PC.name}',
      lambda n: speed(v2, AI_PC, AI_PC, tokens=n),
      "the paper's nearly 20, or twice that",
    ),
    (
      f'72B dense on a {AI_PC.name}',
      lambda n: dense_speed(dense, AI_PC, tokens=n),
      "the paper's single digit",
    ),
    (
      f'V3 on an {RTX_4090.name}, experts in memory of {TWO_XEONS.name}',
      lambda n: speed(v3, TWO_XEONS, RTX_4090, tokens=n),
      "the paper's nearly 20 (KTransformers) is half of this bound",
    ),
    (
      f'V3 on a {M3_ULTRA.name}',
      lambda n: speed(v3, M3_ULTRA, M3_ULTRA, tokens=n),
      '',
    ),
  )
  own = [
    (
      'this config, the same way',
      lambda n: speed(c.model, TWO_XEONS, RTX_4090, tokens=n),
      '',
    )
  ]
  rows, bars = [], []
  for name, at, note in (*paper, *own):
    try:
      one, two = at(1), at(2)
    except ValueError as error:
      rows.append(Row(name, 'does not fit', '', note=str(error)))
      continue
    rows.append(Row(name, one, 'tokens/s', note=note))
    rows.append(Row(f'{name}, MTP', two, 'tokens/s', note=f'{two / one:.2f} times'))
    bars.append((name, one, two))

  def draw(axes: Axes) -> None:
    short = [name.partition(',')[0].removesuffix(' with an AI SoC') for name, *_ in bars]
    at = range(len(bars))
    axes.barh([i - 0.2 for i in at], [one for _, one, _ in bars], 0.38, label='one at a time')
    axes.barh([i + 0.2 for i in at], [two for *_, two in bars], 0.38, label='MTP')
    axes.set_yticks(at, short, fontsize=8)
    axes.invert_yaxis()
    if bars and max(two for *_, two in bars) > 20 * min(one for _, one, _ in bars):
      axes.set_xscale('log')
    axes.set(xlabel='tokens/s at most')
    axes.legend(fontsize=8)

  saved = expert_weights(v3, 2) / expert_weights(v3)
  rows.append(
    Row('V3: experts read for two tokens over one', saved, 'times', note='hence what MTP saves')
  )
  rows = [row for row in rows if isinstance(row.value, str) or math.isfinite(row.value)]
  return Section(
    'Local use',
    'Weights in 4 bits, one user: a mixture of experts runs where a dense model of its quality crawls.',
    (Table('Tokens a second, at most', tuple(rows)),),
    (Chart('Bound by memory bandwidth', draw),),
  )
