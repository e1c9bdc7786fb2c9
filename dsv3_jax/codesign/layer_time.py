"""Time of one layer of the published training step: kernels at their rates, and what stands beside an exchange.

A block is one layer of one micro-batch on one device, experts over 64 devices on 8 nodes. Its time is that of its
matmuls, of what else passes memory, and of its exchanges (2412.19437, 3.2 and 3.3). Where every rate is from, what
is not counted, and how far all that comes from Table 4 of 2505.09343: `step_time.py`, which puts blocks on a clock.

In a pair (3.2.1, Figure 4) FFNs of both stand beside dispatch of one and its mirror of the other, attentions
beside the combines; a half takes the longer of the two. A forward or backward alone hides nothing.
"""

import dataclasses

from dsv3_jax import config, counts
from dsv3_jax.codesign.expert_traffic import row_bytes
from dsv3_jax.codesign.hardware import Hardware

# Bytes of a value: BF16; codes with an FP32 scale for 128; E5M6 with its scale, as attention's output is kept.
BF16, FP8, E5M6, FP32 = 2.0, 1 + 4 / 128, 1.5 + 4 / 128, 4.0
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
RATES = Rates()


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
class Kernels:
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


def _attention(m: config.Model, k: Kernels, seq_len: int) -> tuple[Piece, Piece, Piece]:
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
  before = D * (BF16 + FP8) + down * BF16 + latents * FP8
  before += BF16 * (2 * rope + nope + query)
  # Output cast twice (FP8 to multiply, E5M6 to keep); residual; norm, for experts in FP8, the router in BF16.
  after = value * (2 * BF16 + E5M6 + FP8) + BF16 * 3 * D + D * (2 * BF16 + FP8)
  # Two casts, by token and by channel, of each linear layer's gradient; row sums of the core; its queries'
  # gradient from FP32; rotary parts; norms of latents; norm and residual.
  back = D * (BF16 + 2 * FP8) + 2 * BF16 * value + query * (FP32 + BF16)
  back += BF16 * (query + value) + 2 * FP8 * up + 2 * BF16 * rope + query * (BF16 + 2 * FP8)
  back += down * (3 * BF16 + 2 * FP8) + 4 * BF16 * D
  again = before + D * (BF16 + FP8)  # norms and up-projections are computed again (3.3.3)
  kept = 2 * FP8 * (D + latents) + value * (E5M6 + FP8)  # read by token, written by channel
  count = counts.attention_parameters(m)
  cast = k.weights(r.casts * (BF16 + FP8), count)
  return (
    linear + forward_core + k.passes(before + after) + cast,
    linear + ups + backward_core + k.passes(back + again) + cast,
    linear + k.passes(kept) + k.weights(2 * FP32, count),
  )


def _ffn(m: config.Model, k: Kernels, run: Run, dense: bool) -> tuple[Piece, Piece, Piece]:
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
  swiglu = hidden * (2 * BF16 + 3 * FP8)
  back = hidden * (BF16 + 2 * FP8 + 4 * FP8 + FP8)
  # Rows put in the experts' order, outputs taken out of it; gradients likewise.
  placed = K * D * (2 * FP8 + 2 * BF16)
  residual = (3 if dense else 4) * D * BF16
  cast = k.weights(r.casts * (BF16 + FP8), count)
  by_channel = 2 * FP8 * D * (1 if dense else 1 + K)
  if not dense:
    by_channel += 2 * FP8 * m.moe.num_shared * m.moe.expert_dim
  return (
    linear + k.passes(swiglu + placed + residual) + cast,
    linear + k.passes(back + placed + D * (BF16 + FP8)) + cast,
    linear + k.passes(by_channel) + k.weights(2 * FP32, count),
  )


def block(m: config.Model, hardware: Hardware, run: Run, rates: Rates, dense: bool) -> Block:
  """A layer of one sequence on one device, experts evenly chosen."""
  k = Kernels(run.seq_len, rates)
  attention, ffn = _attention(m, k, run.seq_len), _ffn(m, k, run, dense)
  if dense:
    return Block(attention, ffn)
  nodes = min(m.moe.top_groups, m.moe.top_k)
  sent = lambda kind, part: max(
    run.seq_len * nodes * row_bytes(kind, m.dim) / (part * hardware.slow.nominal),
    run.seq_len * m.moe.top_k * row_bytes(kind, m.dim) / hardware.fast.achieved,
  )
  return Block(attention, ffn, sent('fp8', rates.dispatch), sent('bf16', rates.combine))
