"""Compute: FLOPs of a token in training and decode, and what they need of memory to run at full speed.

Decode with absorbed projections (arXiv 2412.19437, 2.1.1): every head multiplies the same latent, so a
byte of cache serves all of them. FLOPs over bytes of the cache, per token of context:

  MLA   2 heads (2 latent + rotary) / bytes(latent + rotary), 241.8 for V3 in BF16
  GQA   heads / KV heads in BF16, whatever their size: 8 for Qwen-2.5 72B

A chip whose FLOP/s over bytes/s exceed that waits for memory.
"""

import math

from matplotlib.axes import Axes

from dsv3_jax import config, counts
from dsv3_jax.codesign import memory, models
from dsv3_jax.codesign.hardware import Chip, Hardware
from dsv3_jax.codesign.table import Chart, Row, Section, Table


def decode_flops(m: config.Model, context: int) -> float:
  """FLOPs of one new token after `context` others, absorbed; two per weight."""
  return 2 * counts.active_parameters(m, embedding=False) + attention_flops(m) * context


def attention_flops(m: config.Model) -> float:
  """Of one new token for each token of context, all layers: scores, and the sum of latents."""
  return 2.0 * m.num_layers * m.mla.num_heads * (2 * m.mla.kv_rank + m.mla.rope_dim)


def mla_intensity(m: config.Model, dtype: str = 'bf16', queries: int = 1) -> float:
  """FLOPs per byte of cache in decode; `queries`: tokens verified at once."""
  return queries * attention_flops(m) / memory.latent(m).token_bytes(dtype)


def gqa_intensity(d: models.Dense, dtype: str = 'bf16', queries: int = 1) -> float:
  flops = 4.0 * d.num_layers * d.num_heads * d.head_dim
  cache = memory.grouped(d.name, d.num_layers, d.kv_heads, d.head_dim)
  return queries * flops / cache.token_bytes(dtype)


def expert_intensity(tokens: float, weight_bytes: float = 1.0) -> float:
  """FLOPs per byte of an expert's weights with so many tokens."""
  return 2.0 * tokens / weight_bytes


def roof(chip: Chip, intensity: float, dtype: str = 'bf16') -> float:
  """FLOP/s that a chip can reach at so many FLOPs per byte."""
  return min(chip.fp8 if dtype == 'fp8' else chip.bf16, intensity * chip.memory_bandwidth)


def section(c: config.Config, hardware: Hardware) -> Section:
  m, chip = c.model, hardware.chip
  ridge = chip.bf16 / chip.memory_bandwidth
  decode = tuple(
    Row(f'decode after {n:,} tokens', decode_flops(m, n) / 1e9, 'GFLOP a token')
    for n in (4096, 32_768, 131_072)
  )
  points = (
    ('MLA', mla_intensity(m)),
    ('MLA, 2 tokens at once (MTP)', mla_intensity(m, queries=2)),
    ('MLA, cache in FP8', mla_intensity(m, 'fp8')),
    (f'GQA, {models.QWEN_72B.name}', gqa_intensity(models.QWEN_72B)),
    (f'GQA, {models.LLAMA_405B.name}', gqa_intensity(models.LLAMA_405B)),
    ('expert, 32 tokens, FP8', expert_intensity(32)),
    ('expert, 256 tokens, FP8', expert_intensity(256)),
  )
  intensity = tuple(
    Row(
      name,
      x,
      'FLOP/B',
      note=f'at most {100 * roof(chip, x) / chip.bf16:.0f} % of {chip.name} in BF16',
    )
    for name, x in points
  )

  def draw(axes: Axes) -> None:
    xs = [2 ** (i / 4) for i in range(44)]
    axes.loglog(xs, [roof(chip, x) / 1e12 for x in xs], color='black', linewidth=1.2)
    if chip.fp8 > chip.bf16:
      fp8 = [roof(chip, x, 'fp8') / 1e12 for x in xs]
      axes.loglog(xs, fp8, color='black', linewidth=1, linestyle=':', label='FP8 peak')
    for name, x in points:
      dtype = 'fp8' if name.startswith('expert') else 'bf16'
      axes.plot([x], [roof(chip, x, dtype) / 1e12], 'o', label=name)
    axes.set(xlabel='FLOP per byte', ylabel='TFLOP/s')
    axes.legend(fontsize=7, loc='lower right')

  return Section(
    'Compute',
    'A mixture of experts trains and decodes with the FLOPs of the experts chosen; absorbed MLA decodes '
    'with so many FLOPs per byte of cache that a chip computes instead of waiting for memory.',
    (
      _table_2(m, c.batch.seq_len),
      Table('Decode, absorbed', decode),
      Table(
        'FLOPs per byte in decode',
        (*intensity, Row(f'ridge of {chip.name}, BF16', ridge, 'FLOP/B')),
      ),
    ),
    (Chart(f'Roofline of {chip.name}', draw, height=3.4),),
  )


def _table_2(m: config.Model, seq_len: int) -> Table:
  """Table 2 of arXiv 2505.09343, and the model asked about."""
  giga = lambda flops: flops / 1e9
  train = counts.training_flops_per_token
  qwen, llama = models.QWEN_72B, models.LLAMA_405B
  without_kv = llama.training_flops_per_token(4096) - 6 * llama.kv_parameters
  unit = 'GFLOP a token'
  no_formula = 'not met: no one formula gives both dense rows'
  rows = (
    Row('DeepSeek-V2 236B', giga(train(models.V2, 4096)), unit, '155'),
    Row('DeepSeek-V3 671B', giga(train(models.V3, 4096)), unit, '250'),
    Row('DeepSeek-V3 671B, not causal', giga(train(models.V3, 4096, causal=False)), unit),
    Row(f'{qwen.name}, dense', giga(qwen.training_flops_per_token(4096)), unit, '394', no_formula),
    Row(
      f'{llama.name}, dense', giga(llama.training_flops_per_token(4096)), unit, '2448', no_formula
    ),
    Row(f'{llama.name} without key and value projections', giga(without_kv), unit, '2448'),
    Row(f'this config at {seq_len:,}', giga(train(m, seq_len)), unit),
    Row(f'this config at {seq_len:,}, MTP too', giga(train(m, seq_len, mtp=True)), unit),
  )
  return Table('Table 2: training, at 4,096 causal', rows)


def decode_seconds(
  m: config.Model, hardware: Hardware, *, tokens: int, context: int, devices: int
) -> float:
  """Seconds of one layer on one device without any link: what it computes, or reads if that is longer.

  `tokens` a device, each after `context` others; FP8 weights; experts spread over `devices`, evenly
  chosen; attention on every device for its own tokens. A bound, not a measurement.
  """
  chip, layers = hardware.chip, m.num_layers
  attention = counts.attention_parameters(m)
  cache = memory.latent(m)
  seconds = max(2 * tokens * attention / chip.fp8, attention / chip.memory_bandwidth)
  flops = tokens * attention_flops(m) / layers * context
  read = tokens * cache.read(context) / layers
  seconds += max(flops / chip.bf16, read / chip.memory_bandwidth)
  experts = max(1.0, m.moe.num_experts / devices) + m.moe.num_shared
  rows = tokens * (m.moe.top_k + m.moe.num_shared)
  weights = counts.expert_parameters(m)
  work = 2 * rows * weights / chip.fp8
  return seconds + max(work, math.ceil(experts) * weights / chip.memory_bandwidth)
