"""Memory: what a token leaves in the cache, and what training keeps on a device of a mesh.

| cache      | values a token and layer | stays in BF16  | reads for a new token   |
|------------|--------------------------|----------------|-------------------------|
| mha        | 2 heads x head           | nothing        | all                     |
| gqa, mqa   | 2 KV heads x head        | nothing        | all                     |
| mla        | latent, and rotary key   | the rotary key | all                     |
| windowed   | as the one it is made of |                | the last `window`       |
| sparse     | and a small index key    |                | `selected`, all indices |

Quantised caches have scales: one FP32 for 128 values in FP8 (656 bytes a token and layer for MLA, as in
github.com/deepseek-ai/FlashMLA), one BF16 for 32 in INT4.

Training memory is arithmetic on what the trainer keeps, not read off a compiled program. Activations are
what the backward needs of a layer, by `model.remat`; FP8 caches inputs of linear layers in FP8, the
attention's output in 12 bits, and recomputes SwiGLU (arXiv 2412.19437, 3.3.3).
"""

import dataclasses

from matplotlib.axes import Axes

from dsv3_jax import config, counts
from dsv3_jax.codesign import models
from dsv3_jax.codesign.hardware import Hardware
from dsv3_jax.codesign.table import Chart, Row, Section, Table

# ---- caches --------------------------------------------------------------------------------------

VALUE_BYTES = {'fp32': 4.0, 'bf16': 2.0, 'fp8': 1 + 4 / 128, 'int4': 0.5 + 2 / 32}


@dataclasses.dataclass(frozen=True)
class Cache:
  """Values of one token in one layer, and how many tokens of the past are kept and read."""

  name: str
  layers: int
  values: int  # that may be quantised
  plain: int = 0  # that stay in BF16 where others are coded
  window: int | None = None  # tokens kept
  selected: int | None = None  # tokens read
  index: int = 0  # bytes of the key by which they are selected

  def token_bytes(self, dtype: str = 'bf16') -> float:
    """Of one token in all layers; raises ValueError for an unknown dtype."""
    if dtype not in VALUE_BYTES:
      raise ValueError(f'cache dtype {dtype!r}: must be one of {", ".join(VALUE_BYTES)}')
    plain = 4 if dtype == 'fp32' else 2
    return self.layers * (self.values * VALUE_BYTES[dtype] + self.plain * plain + self.index)

  def stored(self, context: int, dtype: str = 'bf16') -> float:
    """Bytes of a sequence of so many tokens."""
    return self.token_bytes(dtype) * min(context, self.window or context)

  def read(self, context: int, dtype: str = 'bf16') -> float:
    """Bytes read for one new token."""
    kept = min(context, self.window or context)
    if self.selected is None:
      return self.token_bytes(dtype) * kept
    index = self.layers * self.index
    return (self.token_bytes(dtype) - index) * min(kept, self.selected) + index * kept


def grouped(name: str, layers: int, kv_heads: int, head_dim: int) -> Cache:
  """GQA; MHA with all heads, MQA with one."""
  return Cache(name, layers, 2 * kv_heads * head_dim)


def latent(m: config.Model, name: str = 'MLA') -> Cache:
  return Cache(name, m.num_layers, m.mla.kv_rank, m.mla.rope_dim)


def alternatives(m: config.Model) -> tuple[Cache, ...]:
  """What the model's layers would cache with other attention of the same heads."""
  heads, dim, mla = m.mla.num_heads, m.mla.nope_dim, latent(m)
  return (
    grouped('MHA', m.num_layers, heads, dim),
    grouped('GQA, 8 heads a group', m.num_layers, max(heads // 8, 1), dim),
    grouped('MQA', m.num_layers, 1, dim),
    mla,
    dataclasses.replace(mla, name='MLA, window of 4,096', window=4096),
    dataclasses.replace(mla, name='MLA, 2,048 selected', selected=2048, index=132),
  )


# ---- training ------------------------------------------------------------------------------------

_BYTES = {'fp32': 4, 'bf16': 2, 'fp8': 1}


@dataclasses.dataclass(frozen=True)
class State:
  """Bytes on the fullest device."""

  weights: float  # as matmuls take them
  gradients: float  # FP32
  master: float  # FP32, and AdamW's moments
  activations: float

  @property
  def total(self) -> float:
    return self.weights + self.gradients + self.master + self.activations


def training_state(
  c: config.Config, mesh: config.Mesh, *, precision: str, ways: int = 1, zero: int | None = None
) -> State:
  """Of a device of the mesh that holds `ways` stages (DualPipe: 2) and one sequence in each slot.

  Layers are dealt evenly; embedding and head lie on one device (3.2.3 of the report). ZeRO splits what
  devices hold copies of: 1 the master weights and moments, 3 the weights and gradients too.

  Raises:
    ValueError: a mesh that cannot be: experts or layers do not go round.
  """
  m, e = c.model, c.model.moe
  zero = mesh.zero if zero is None else zero
  ep = mesh.node * mesh.local
  if e.num_experts % ep:
    raise ValueError(
      f'mesh.node x mesh.local = {ep}: must divide model.moe.num_experts = {e.num_experts}'
    )
  if mesh.pipe > m.num_layers:
    raise ValueError(f'mesh.pipe = {mesh.pipe}: must be at most {m.num_layers}, the layers')
  layers = m.num_layers + m.mtp_depth
  moe_layers = layers - m.num_dense_layers
  on_stage = -(-layers // mesh.pipe)
  experts = ways * on_stage * moe_layers / layers * e.num_experts / ep
  experts *= counts.expert_parameters(m)
  all_routed = moe_layers * e.num_experts * counts.expert_parameters(m)
  embeddings = 2 * counts.embedding_parameters(m)
  rest = counts.parameters(m) + counts.mtp_parameters(m) - all_routed - embeddings
  rest = ways * rest * on_stage / layers + embeddings
  # Copies: of experts over `data`, of the rest over everything but the pipeline.
  split = lambda level: (mesh.data, mesh.data * ep) if zero >= level else (1, 1)
  held = lambda level: experts / split(level)[0] + rest / split(level)[1]
  moments = 2 * _BYTES[c.optimizer.moments]
  slots = mesh.pipe + 1 if ways == 2 else mesh.pipe
  per_layer = sum(activations(m, precision=precision).values())
  return State(
    weights=_BYTES[precision] * held(3),
    gradients=4 * held(3),
    master=(4 + moments) * held(1),
    activations=slots * on_stage * c.batch.seq_len * per_layer,
  )


def activations(m: config.Model, *, precision: str) -> dict[str, float]:
  """Bytes a token of one MoE layer keeps for the backward, by `model.remat`."""
  a, e = m.mla, m.moe
  wide = 4 if precision == 'fp32' else 2
  low = 1 + 4 / 128 if precision == 'fp8' else wide
  chosen = e.top_k + e.num_shared
  kept = {'inputs of the block': m.dim * wide}
  if m.remat == 'block':
    return kept
  kept |= {
    'inputs of the FFN': m.dim * wide,
    'latents': (a.q_rank + a.kv_rank + a.rope_dim) * wide,
    'output of attention': a.num_heads * a.v_dim * (1.5 if precision == 'fp8' else wide),
    "softmax's sums": 4 * a.num_heads,
    'inputs of experts': chosen * m.dim * low,
    'inputs of SwiGLU': chosen * 2 * e.expert_dim * low,
  }
  if m.remat == 'none':
    expanded = a.num_heads * (2 * (a.nope_dim + a.rope_dim) + a.v_dim)
    kept |= {
      'queries, keys, values': expanded * wide,
      'normed': (2 * m.dim + a.q_rank + a.kv_rank) * wide,
      'outputs of SwiGLU': chosen * e.expert_dim * low,
    }
  return kept


# ---- section -------------------------------------------------------------------------------------

PAPER_MESH = config.Mesh(pipe=16, data=2, node=8, local=8, zero=1)
_CONTEXTS = (4096, 32_768, 131_072)


def section(c: config.Config, hardware: Hardware) -> Section:
  m = c.model
  ours = latent(m)
  caches = alternatives(m)

  def draw(axes: Axes) -> None:
    contexts = [2**i for i in range(10, 18)]
    for cache in caches:
      axes.loglog(contexts, [cache.stored(n) / 1e9 for n in contexts], label=cache.name)
    axes.axhline(hardware.chip.memory / 1e9, color='black', linestyle=':', linewidth=1)
    axes.text(contexts[-1], hardware.chip.memory / 1e9 * 1.15, hardware.chip.name, ha='right')
    axes.set(xlabel='context, tokens', ylabel='GB a sequence, BF16')
    axes.legend(fontsize=7.5, ncols=3, loc='lower left', bbox_to_anchor=(-0.1, 1))

  title = "Caches that the model's heads could have, BF16"
  per_token = [Row(x.name, x.token_bytes() / 1e3, 'KB a token') for x in caches]
  lengths = [
    Row(f'{kind}, {n:,} tokens', ours.stored(n, kind) / 1e9, 'GB')
    for kind in ('bf16', 'fp8', 'int4')
    for n in _CONTEXTS
  ]
  return Section(
    'Memory',
    'What attention leaves behind decides how many users fit on a chip; what training keeps decides '
    'the mesh. 1 KB is 1,000 bytes.',
    (
      _table_1(m),
      Table(title, tuple(per_token)),
      Table('The latent cache of one sequence', tuple(lengths)),
      *_training(c, hardware),
    ),
    (Chart('Cache of one sequence, and the memory of a chip', draw),),
  )


def _table_1(m: config.Model) -> Table:
  """Table 1 of arXiv 2505.09343, and the model asked about."""
  v3 = latent(models.V3).token_bytes()
  rows = [Row('DeepSeek-V3, MLA', v3 / 1e3, 'KB a token', '70.272')]
  printed = ((models.QWEN_72B, '327.680', '4.66', ''), (models.LLAMA_405B, '516.096', '7.28', ''))
  for model, size, ratio, note in printed:
    cached = grouped(model.name, model.num_layers, model.kv_heads, model.head_dim).token_bytes()
    if model is models.LLAMA_405B:
      note = 'misprint: 516.096 over 70.272 is 7.34'
    rows.append(Row(f'{model.name}, GQA', cached / 1e3, 'KB a token', size))
    rows.append(Row(f'{model.name}, of V3', cached / v3, 'times', ratio, note))
  rows.append(Row('this config, MLA', latent(m).token_bytes() / 1e3, 'KB a token'))
  return Table('Table 1: cache per token, BF16', tuple(rows))


def _training(c: config.Config, hardware: Hardware) -> list[Table]:
  tables = []
  layouts = [("the report's mesh, FP8, DualPipe", PAPER_MESH, 'fp8', 2)]
  ways = c.mesh.pipe * c.mesh.data * c.mesh.node * c.mesh.local
  if ways > 1 or c.model != models.V3:
    layouts.append(("this config's mesh", c.mesh, c.model.precision, 1))
  for name, mesh, precision, stages in layouts:
    sizes = f'{mesh.pipe} x {mesh.data} x {mesh.node} x {mesh.local}'
    try:
      state = training_state(c, mesh, precision=precision, ways=stages)
    except ValueError as error:
      tables.append(Table(f'Training on {name} ({sizes})', (Row('cannot be', str(error)),)))
      continue
    rows = [
      Row(field.name, getattr(state, field.name) / 1e9, 'GB') for field in dataclasses.fields(state)
    ]
    share = state.total / hardware.chip.memory
    note = '' if share <= 1 else f'does not fit {hardware.chip.memory / 1e9:.0f} GB'
    rows.append(Row('together', state.total / 1e9, 'GB', note=note))
    rows.append(Row(f'of one {hardware.chip.name}', 100 * share, '%'))
    tables.append(Table(f'Training on {name} ({sizes})', tuple(rows)))
  return tables
