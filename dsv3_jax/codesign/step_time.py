"""Time of the published training step from its parts: arXiv 2412.19437, 3.2, against Table 4 of 2505.09343.

2,048 H800 as 16 stages x 128 replicas, experts over 64 devices on 8 nodes, one sequence of 4,096 a micro-batch,
120 of them through each pipeline. A block's time is that of its matmuls, of what else passes memory, and of its
exchanges; DualPipe's own order (`parallel/pipeline`) puts blocks on a clock. No number is fitted to Table 4, but
which of the published rates and casts count was decided with it in sight: without the lowered clock a step takes
8 % less, with weights cast once a step 2 % less.

| what                                  | taken                                   | from                                  |
|---------------------------------------|-----------------------------------------|---------------------------------------|
| FP8 matmuls, by shape, all 3 passes   | 590 to 1,358 TFLOP/s                    | DeepGEMM's first README, M = 4,096    |
| BF16 matmuls: heads, MTP, router      | 660 TFLOP/s                             | FlashMLA, compute bound               |
| attention core, beside an exchange    | 1.25 ms forward, 3.7 backward a layer   | DeepSeek's published training profile |
| clock under sustained load            | 865 / 990 of the matmul rates           | FlashMLA's deep dive                  |
| memory                                | 2,668 GB/s                              | DeepGEMM's fastest memory-bound shape |
| exchange                              | 46 GB/s out in FP8, 45 back in BF16     | DeepEP's first README, 64 devices     |
| NVLink, InfiniBand in sums of weights | achieved ones of `hardware.py`          | 2505.09343                            |
| multiprocessors of an exchange        | 20 of 132, while one runs               | 2412.19437, 3.2.2                     |
| passes over memory                    | each kernel reads inputs, writes result | 2412.19437, 3.3 (`_Block`)            |
| gradients of weights                  | FP32, read and written a micro-batch    | 2412.19437, 3.3.2                     |
| FP8 weights                           | cast from BF16 at each use              | 2412.19437, Figure 6                  |

Overlap (3.2.1, Figure 4): in a pair, FFNs of both stand beside dispatch of one and its mirror of the other,
attentions beside the combines; a half takes the longer of the two. A forward or backward alone hides nothing.
Layers are dealt by `pipeline.stages`, embedding in the first stage, head and MTP in the last: the report does
not say how. Not in: gaps between kernels, uneven routing, slower memory beside an exchange, losses of blocks
that are padded. All of these would add time.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable

from matplotlib.axes import Axes

from dsv3_jax import config, counts
from dsv3_jax.codesign import cost, models
from dsv3_jax.codesign.expert_traffic import row_bytes
from dsv3_jax.codesign.hardware import H800, Hardware
from dsv3_jax.codesign.table import Chart, Row, Section, Table
from dsv3_jax.parallel.pipeline import schedules, simulate, stages
from dsv3_jax.parallel.pipeline.schedules import Item, Op

# Bytes of a value: BF16; codes with an FP32 scale for 128; E5M6 with its scale, as attention's output is kept.
_BF16, _FP8, _E5M6, _FP32 = 2.0, 1 + 4 / 128, 1.5 + 4 / 128, 4.0
_LEFT = 112 / 132  # of the SMs, beside an exchange


@dataclasses.dataclass(frozen=True)
class Rates:
  """What kernels reach. FLOP/s of FP8 matmuls are by what they multiply, the published shape beside each."""

  latents: float = 1058e12  # 2112 x 7168
  queries: float = 990e12  # 24576 x 1536
  keys_values: float = 590e12  # 32768 x 512
  out: float = 1358e12  # 7168 x 16384; the dense FFN's second matmul too, the nearest in depth
  experts_up: float = 1297e12  # 4 groups of 8192, 4096 x 7168
  experts_down: float = 1099e12  # 4 groups of 8192, 7168 x 2048
  ffn_up: float = 1304e12  # 4096 x 7168
  shared_down: float = 1025e12  # 7168 x 2048
  bf16: float = 660e12
  core_forward: float = 550e12 / _LEFT  # 0.69 TFLOP in 1.25 ms on the SMs that an exchange leaves
  core_backward: float = 464e12 / _LEFT  # 1.72 TFLOP in 3.7 ms
  clock: float = 865 / 990  # of matmul rates; the core's were taken under load
  memory: float = 2668e9  # bytes/s
  dispatch: float = 46 / 50  # of the slow links; counts a token's own node too
  combine: float = 45 / 50
  compute_sms: float = _LEFT  # beside an exchange
  casts: float = 1.0  # of a weight from BF16, for each use


@dataclasses.dataclass(frozen=True)
class Run:
  """How a model is trained. `ep` devices share the experts, `local` of them a node."""

  pipe: int = 16
  replicas: int = 128
  ep: int = 64
  local: int = 8
  sequences: int = 15_360
  seq_len: int = 4096


PAPER = Run()


@dataclasses.dataclass(frozen=True)
class Piece:
  """Seconds of some kernels: multiplying on all SMs, and passing memory."""

  matmul: float = 0.0
  memory: float = 0.0

  def __add__(self, other: 'Piece') -> 'Piece':
    return Piece(self.matmul + other.matmul, self.memory + other.memory)

  @property
  def alone(self) -> float:
    return self.matmul + self.memory

  def beside(self, sms: float) -> float:
    """While an exchange holds the other SMs; memory takes as long."""
    return self.matmul / sms + self.memory


@dataclasses.dataclass(frozen=True)
class Block:
  """One layer of one micro-batch: [forward, input, weight] of attention and FFN, and its exchanges."""

  attention: tuple[Piece, Piece, Piece]
  ffn: tuple[Piece, Piece, Piece]
  dispatch: float = 0.0  # FP8 out; the backward of a combine is one too
  combine: float = 0.0

  def alone(self, part: int) -> float:
    sent = self.dispatch + self.combine if part < 2 else 0.0
    return self.attention[part].alone + self.ffn[part].alone + sent


def pair(forward: Block, backward: Block, sms: float) -> float:
  """A forward of one and a whole backward of another, in two halves."""
  beside = lambda f, *b: sum(piece.beside(sms) for piece in (f, *b))
  ffn = beside(forward.ffn[0], *backward.ffn[1:])
  attention = beside(forward.attention[0], *backward.attention[1:])
  return max(ffn, forward.dispatch + backward.combine) + max(
    attention, forward.combine + backward.dispatch
  )


# ---- one layer -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Kernels:
  """Seconds of kernels over the tokens of one micro-batch."""

  tokens: int
  rates: Rates

  def fp8(self, rate: float, n: int, k: int, rows: float = 1.0) -> Piece:
    """A matmul of `rows` a token; its operands' way through memory is in the rate."""
    return Piece(2 * self.tokens * rows * n * k / (rate * self.rates.clock))

  def bf16(self, n: int, k: int) -> Piece:
    return self.fp8(self.rates.bf16, n, k)

  def passes(self, token_bytes: float) -> Piece:
    return Piece(memory=self.tokens * token_bytes / self.rates.memory)

  def weights(self, each: float, count: float) -> Piece:
    """Of a device's own: bytes each."""
    return Piece(memory=each * count / self.rates.memory)


def _attention(m: config.Model, k: _Kernels, seq_len: int) -> tuple[Piece, Piece, Piece]:
  a, r, D = m.mla, k.rates, m.dim
  latents = a.q_rank + a.kv_rank
  down = latents + a.rope_dim
  query = a.num_heads * (a.nope_dim + a.rope_dim)  # keys as many
  nope, rope = a.num_heads * a.nope_dim, a.num_heads * a.rope_dim
  value, up = a.num_heads * a.v_dim, a.num_heads * (a.nope_dim + a.v_dim)
  ups = k.fp8(r.queries, query, a.q_rank) + k.fp8(r.keys_values, up, a.kv_rank)
  linear = k.fp8(r.latents, down, D) + ups + k.fp8(r.out, D, value)
  # Scores and weighted values over half of the keys; 5 products backward for 2 forward.
  core = k.tokens * (query + value) * seq_len
  forward_core = Piece(core / r.core_forward)
  backward_core = Piece(2.5 * core / r.core_backward)
  # Norm and cast; norms of latents and cast; rotary parts of queries; keys, put together.
  before = D * (_BF16 + _FP8) + down * _BF16 + latents * _FP8
  before += _BF16 * (2 * rope + nope + query)
  # Output cast twice (FP8 to multiply, E5M6 to keep); residual; norm, for experts in FP8, the router in BF16.
  after = value * (2 * _BF16 + _E5M6 + _FP8) + _BF16 * 3 * D + D * (2 * _BF16 + _FP8)
  # Two casts, by token and by channel, of each linear layer's gradient; row sums of the core; its queries'
  # gradient from FP32; rotary parts; norms of latents; norm and residual.
  back = D * (_BF16 + 2 * _FP8) + 2 * _BF16 * value + query * (_FP32 + _BF16)
  back += _BF16 * (query + value) + 2 * _FP8 * up + 2 * _BF16 * rope + query * (_BF16 + 2 * _FP8)
  back += down * (3 * _BF16 + 2 * _FP8) + 4 * _BF16 * D
  again = before + D * (_BF16 + _FP8)  # norms and up-projections are computed again (3.3.3)
  kept = 2 * _FP8 * (D + latents) + value * (_E5M6 + _FP8)  # read by token, written by channel
  count = counts.attention_parameters(m)
  cast = k.weights(r.casts * (_BF16 + _FP8), count)
  return (
    linear + forward_core + k.passes(before + after) + cast,
    linear + ups + backward_core + k.passes(back + again) + cast,
    linear + k.passes(kept) + k.weights(2 * _FP32, count),
  )


def _ffn(m: config.Model, k: _Kernels, run: Run, dense: bool) -> tuple[Piece, Piece, Piece]:
  """SwiGLU: of a dense layer, or of the shared and the routed experts of a device."""
  r, D, K = k.rates, m.dim, 0 if dense else m.moe.top_k
  hidden = m.ffn_dim if dense else m.moe.num_shared * m.moe.expert_dim
  linear = k.fp8(r.ffn_up, 2 * hidden, D)
  linear += k.fp8(r.out if dense else r.shared_down, D, hidden)
  count = 3 * D * hidden
  if not dense:
    F = m.moe.expert_dim
    linear += k.fp8(r.experts_up, 2 * F, D, K) + k.fp8(r.experts_down, D, F, K)
    linear += k.bf16(m.moe.num_experts, D)
    count += m.moe.num_experts / run.ep * counts.expert_parameters(m)
    hidden += K * F  # a token's, over all of its experts
  # Input read and kept in FP8, output cast. Backward: its gradient, the kept input; gradients by token and by
  # channel, the output once more by channel.
  swiglu = hidden * (2 * _BF16 + 3 * _FP8)
  back = hidden * (_BF16 + 2 * _FP8 + 4 * _FP8 + _FP8)
  # Rows put in the experts' order, outputs taken out of it; gradients likewise.
  placed = K * D * (2 * _FP8 + 2 * _BF16)
  residual = (3 if dense else 4) * D * _BF16
  cast = k.weights(r.casts * (_BF16 + _FP8), count)
  by_channel = 2 * _FP8 * D * (1 if dense else 1 + K)
  if not dense:
    by_channel += 2 * _FP8 * m.moe.num_shared * m.moe.expert_dim
  return (
    linear + k.passes(swiglu + placed + residual) + cast,
    linear + k.passes(back + placed + D * (_BF16 + _FP8)) + cast,
    linear + k.passes(by_channel) + k.weights(2 * _FP32, count),
  )


def block(m: config.Model, hardware: Hardware, run: Run, rates: Rates, dense: bool) -> Block:
  """A layer of one sequence on one device, experts evenly chosen."""
  k = _Kernels(run.seq_len, rates)
  attention, ffn = _attention(m, k, run.seq_len), _ffn(m, k, run, dense)
  if dense:
    return Block(attention, ffn)
  nodes = min(m.moe.top_groups, m.moe.top_k)
  sent = lambda kind, part: max(
    run.seq_len * nodes * row_bytes(kind, m.dim) / (part * hardware.slow.nominal),
    run.seq_len * m.moe.top_k * row_bytes(kind, m.dim) / hardware.fast.achieved,
  )
  return Block(attention, ffn, sent('fp8', rates.dispatch), sent('bf16', rates.combine))


# ---- the pipeline --------------------------------------------------------------------------------


class _Costs:
  """Seconds of an operation of a schedule: blocks of its stages, and what the last stage has besides."""

  def __init__(self, m: config.Model, hardware: Hardware, run: Run, rates: Rates) -> None:
    arranged = stages.arrange(
      m.num_dense_layers, m.num_layers - m.num_dense_layers, m.mtp_depth, run.pipe
    )
    kinds = {dense: block(m, hardware, run, rates, dense) for dense in (True, False)}
    rows = [[int(n) for n in row if n >= 0] for row in arranged.blocks]
    self.blocks = [[kinds[n < m.num_dense_layers] for n in row] for row in rows]
    self.transfer = _BF16 * run.seq_len * m.dim / hardware.slow.achieved
    self._sms = rates.compute_sms
    k, modules = _Kernels(run.seq_len, rates), m.mtp_depth
    head = k.bf16(m.vocab_size, m.dim) + k.passes(2 * _FP32 * m.vocab_size)
    join = k.bf16(m.dim, 2 * m.dim)
    once = head.alone * (1 + modules) + join.alone * modules
    written = k.weights(2 * _FP32, counts.embedding_parameters(m) * (1 + modules)).alone
    self._ends = (once, once, once + written)

  def time(self, op: Op) -> float:
    forward, backward = self._of(op.forward), self._of(op.backward)
    parts = ((op.forward, 0), (op.backward, 1), (op.weight, 2))
    ends = sum(self._ends[part] for item, part in parts if item and self._is_last(item))
    if op.kind != 'FB':
      return ends + sum(b.alone(part) for item, part in parts for b in self._of(item))
    both = min(len(forward), len(backward))
    beside = sum(pair(f, b, self._sms) for f, b in zip(forward, backward, strict=False))
    rest = sum(b.alone(0) for b in forward[both:])
    return ends + beside + rest + sum(b.alone(1) + b.alone(2) for b in backward[both:])

  def _of(self, item: Item | None) -> list[Block]:
    return self.blocks[item.stage] if item else []

  def _is_last(self, item: Item) -> bool:
    return item.stage == len(self.blocks) - 1


def optimizer_seconds(
  m: config.Model, hardware: Hardware, run: Run, layers: int, ends: bool
) -> float:
  """Of a rank with so many layers: sums of gradients in FP32, AdamW on a device's share, weights back in BF16.

  `ends`: with the first and the last stage, embedding, head and MTP's projection. Both ranks that hold a stage
  (DualPipe) share it. Inside a node, whose devices hold the same, over fast links first; copies of experts lie
  on other nodes. One after another; nothing of it beside the backward.
  """
  routed = layers * m.moe.num_experts / run.ep * counts.expert_parameters(m)
  shared = m.moe.num_shared * counts.expert_parameters(m)
  rest = layers * (counts.attention_parameters(m) + shared + counts.router_parameters(m))
  if ends:
    rest += 2 * counts.embedding_parameters(m) + m.mtp_depth * counts.projection_parameters(m)
  copies = 2 * run.replicas // run.ep
  links = (routed * (1 - 1 / copies) + rest / run.local) / hardware.slow.achieved
  links += rest * (1 - 1 / run.local) / hardware.fast.achieved
  owned = routed / copies + rest / (2 * run.replicas)
  # Master weights and two BF16 moments read and written, gradients read.
  adam = owned * (2 * _FP32 + 4 * _BF16 + _FP32) / hardware.chip.memory_bandwidth
  return links * (_FP32 + _BF16) + adam


# ---- the step ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Step:
  """Seconds; parts as Table 4 names them, means over ranks."""

  parts: dict[str, float]

  @property
  def seconds(self) -> float:
    return sum(self.parts.values())


_NAMES = {'F': '1F', 'I': '1B', 'B': '1B', 'W': '1W', 'FB': '1F1B'}


def predict(
  m: config.Model = models.V3,
  hardware: Hardware = H800,
  run: Run = PAPER,
  rates: Rates = Rates(),
) -> Step:
  """The step of `run`; raises ValueError for sizes that DualPipe has no order for."""
  if run.sequences % run.replicas:
    raise ValueError(
      f'{run.sequences} sequences over {run.replicas} replicas: must be a multiple of them'
    )
  costs = _Costs(m, hardware, run, rates)
  made = schedules.make('dualpipe', run.pipe, run.sequences // run.replicas)
  t = simulate.simulate(made, costs)
  parts = dict.fromkeys(cost.PARTS, 0.0)
  for span in itertools.chain(*t.ranks):
    parts[_NAMES[span.op.kind]] += (span.end - span.start) / run.pipe
  parts['bubble'] = sum(t.bubbles) / run.pipe
  layers = [len(a) + len(b) for a, b in zip(costs.blocks, costs.blocks[::-1], strict=True)]
  each = (optimizer_seconds(m, hardware, run, n, ends=r == 0) for r, n in enumerate(layers))
  return Step(parts | {'optimizer': max(each)})


# ---- section -------------------------------------------------------------------------------------

_OTHERWISE: tuple[tuple[str, Callable[[Rates], Rates]], ...] = (
  ('clock not lowered', lambda r: dataclasses.replace(r, clock=1.0)),
  ('memory at 3,000 GB/s (FlashMLA)', lambda r: dataclasses.replace(r, memory=3000e9)),
  ('FP8 weights cast once a step', lambda r: dataclasses.replace(r, casts=0.0)),
  ('exchange on no SMs', lambda r: dataclasses.replace(r, compute_sms=1.0)),
  (
    'exchange twice as slow',
    lambda r: dataclasses.replace(r, dispatch=r.dispatch / 2, combine=r.combine / 2),
  ),
)


def section(c: config.Config, hardware: Hardware) -> Section:
  """Of the published run, whatever is asked about: rates of kernels are known for it alone."""
  del c, hardware
  seconds, printed, _ = cost.TABLE_4['MPFT']
  step = predict()
  off = lambda value, of: f'{100 * (value / of - 1):+.0f} %'
  table = dict(zip(cost.PARTS, printed, strict=True))
  note = {'bubble': 'mean over ranks; layers dealt as here'}
  rows = [
    Row('a step', step.seconds, 's', f'{seconds}', off(step.seconds, seconds)),
    *(
      Row(name, step.parts[name], 's', f'{value:.2f}', _join(off(step.parts[name], value), note.get(name)))
      for name, value in table.items()
    ),
  ]  # fmt: skip
  moe = block(models.V3, H800, PAPER, Rates(), dense=False)
  layer = [
    Row('MoE layer: a forward beside a backward', 1e3 * pair(moe, moe, Rates().compute_sms), 'ms',
        note='32.3 in the published profile of 4 layers: most of what is missing is here'),
    *(Row(f'MoE layer: {name} alone', 1e3 * moe.alone(part), 'ms')
      for part, name in enumerate(('forward', 'input gradient', 'weight gradient'))),
    Row('dispatch', 1e3 * moe.dispatch, 'ms', note='4.6 beside compute in the profile'),
    Row('combine', 1e3 * moe.combine, 'ms', note='6.0 beside compute in the profile'),
  ]  # fmt: skip
  otherwise = [
    Row(name, predict(rates=change(Rates())).seconds, 's', note='in place of that assumption')
    for name, change in _OTHERWISE
  ]

  def draw(axes: Axes) -> None:
    _bars(axes, [('here', step.parts), ('printed', table)], table)

  return Section(
    'Time of a step',
    'The published step of 2,048 H800 from rates that kernels were published to reach, bytes over links and '
    "memory, and DualPipe's order. No number is fitted to Table 4, though what counts was decided with it in "
    'sight; what is not counted adds time.',
    (
      Table('Table 4, MPFT: predicted and printed', tuple(rows)),
      Table('What one layer takes', tuple(layer)),
      Table('The step with another assumption', tuple(otherwise)),
    ),
    (Chart('A step by its parts', draw, height=2.2),),
  )


def _join(*words: str | None) -> str:
  return '; '.join(word for word in words if word)


def _bars(axes: Axes, lines: list[tuple[str, dict[str, float]]], names: Iterable[str]) -> None:
  left = dict.fromkeys((name for name, _ in lines), 0.0)
  for part in names:
    widths = [parts[part] for _, parts in lines]
    axes.barh([name for name, _ in lines], widths, left=list(left.values()), label=part)
    left = {name: at + width for (name, at), width in zip(left.items(), widths, strict=True)}
  axes.invert_yaxis()
  axes.set(xlabel='s')
  axes.legend(fontsize=7, ncols=6, loc='lower left', bbox_to_anchor=(0, 1))
