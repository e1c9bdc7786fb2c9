"""The models of the papers' tables, besides the one that is asked about: what sizes decide, no weights.

Sizes of V3 and V2 are those of `configs/`; of Qwen-2.5 72B and LLaMA-3.1 405B those of their public
config.json.
"""

import dataclasses

from dsv3_jax import config

V3 = config.Model()
V2 = config.Model(
  vocab_size=102_400,
  dim=5120,
  ffn_dim=12_288,
  num_layers=60,
  num_dense_layers=1,
  mtp_depth=0,
  moe=config.Moe(
    num_experts=160, num_shared=2, top_k=6, expert_dim=1536, top_groups=3, scoring='softmax',
    normalize=False, route_scale=16.0,
  ),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Dense:
  """A transformer with grouped-query attention and SwiGLU, nothing routed."""

  name: str
  vocab_size: int
  dim: int
  ffn_dim: int
  num_layers: int
  num_heads: int
  kv_heads: int
  head_dim: int = 128

  @property
  def kv_parameters(self) -> int:
    """Of the key and value projections of all layers."""
    return self.num_layers * 2 * self.dim * self.kv_heads * self.head_dim

  @property
  def matmul_parameters(self) -> int:
    """Of every matrix that multiplies a token, head included, embedding not."""
    queries_and_out = self.num_layers * 2 * self.dim * self.num_heads * self.head_dim
    ffn = self.num_layers * 3 * self.dim * self.ffn_dim
    return queries_and_out + self.kv_parameters + ffn + self.vocab_size * self.dim

  def training_flops_per_token(self, seq_len: int) -> float:
    """As `counts.training_flops_per_token`: six per weight, causal attention over half the keys."""
    attention = 6.0 * self.num_layers * self.num_heads * 2 * self.head_dim * seq_len / 2
    return 6.0 * self.matmul_parameters + attention


QWEN_72B = Dense('Qwen-2.5 72B', 152_064, 8192, 29_568, 80, 64, 8)
LLAMA_405B = Dense('LLaMA-3.1 405B', 128_256, 16_384, 53_248, 126, 128, 8)
