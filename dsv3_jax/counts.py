"""Exact parameter counts and training FLOPs, from the config alone.

Sources: arXiv 2412.19437, sections 1 and 4.2, for the sizes of DeepSeek-V3; arXiv 2505.09343,
Table 2, for GFLOP per token. The published figures, and what each of them counts:

| figure                  | V3              | V2              | V2-Lite        | counts           |
|-------------------------|-----------------|-----------------|----------------|------------------|
| `parameters`            | 671,026,419,200 | 235,741,434,880 | 15,706,484,224 | all but MTP      |
| `mtp_parameters`        | 11,610,068,224  | 0               | 0              | what is unshared |
| `active_parameters`     | 36,624,596,992  | 20,850,769,920  | 2,451,308,544  | chosen matrices  |
| ... with the embedding  | 37,551,276,032  | 21,375,057,920  | 2,661,023,744  | the same         |
| GFLOP per token, T=4096 | 249.81          | 155.01          | 16.39          | without router   |

Norms and the router bias count in the first two alone, the router in the first four. The bias
counts where it chooses experts, in sigmoid routing: V2 has none. No jax in here.
"""

from dsv3_jax.config import Model

# ---- pieces: weights of the matrices -------------------------------------------------------------


def embedding_parameters(m: Model) -> int:
  """Of the input embedding; the output head has as many."""
  return m.vocab_size * m.dim


def attention_parameters(m: Model) -> int:
  """Of one layer's MLA."""
  a = m.mla
  query = a.num_heads * (a.nope_dim + a.rope_dim)
  queries = m.dim * a.q_rank + a.q_rank * query if a.q_rank else m.dim * query
  down = m.dim * (a.kv_rank + a.rope_dim)
  up = a.kv_rank * a.num_heads * (a.nope_dim + a.v_dim)
  return queries + down + up + a.num_heads * a.v_dim * m.dim


def ffn_parameters(m: Model) -> int:
  """Of one dense layer's SwiGLU."""
  return 3 * m.dim * m.ffn_dim


def expert_parameters(m: Model) -> int:
  """Of one expert, routed or shared."""
  return 3 * m.dim * m.moe.expert_dim


def router_parameters(m: Model) -> int:
  """Of one layer's router, bias aside."""
  return m.dim * m.moe.num_experts


def projection_parameters(m: Model) -> int:
  """Of the matrix that joins hidden state and embedding in one MTP module."""
  return 2 * m.dim * m.dim


# ---- pieces: vectors -----------------------------------------------------------------------------


def norm_parameters(m: Model) -> int:
  """Of one block's RMSNorms: before attention, before the FFN, on the latents."""
  return 2 * m.dim + m.mla.q_rank + m.mla.kv_rank


def bias_parameters(m: Model) -> int:
  """Of one layer's router bias, where there is one."""
  return m.moe.num_experts if m.moe.scoring == 'sigmoid' else 0


# ---- blocks --------------------------------------------------------------------------------------


def dense_block_parameters(m: Model) -> int:
  return norm_parameters(m) + attention_parameters(m) + ffn_parameters(m)


def moe_block_parameters(m: Model) -> int:
  experts = (m.moe.num_experts + m.moe.num_shared) * expert_parameters(m)
  router = router_parameters(m) + bias_parameters(m)
  return norm_parameters(m) + attention_parameters(m) + router + experts


def mtp_module_parameters(m: Model) -> int:
  """Of one MTP module: projection, MoE block, three norms; embedding and head are the model's."""
  return projection_parameters(m) + moe_block_parameters(m) + 3 * m.dim


# ---- models --------------------------------------------------------------------------------------


def parameters(m: Model) -> int:
  """Of the main model: everything but MTP."""
  dense = m.num_dense_layers * dense_block_parameters(m)
  moe = (m.num_layers - m.num_dense_layers) * moe_block_parameters(m)
  return 2 * embedding_parameters(m) + dense + moe + m.dim


def mtp_parameters(m: Model) -> int:
  """Of all MTP modules together."""
  return m.mtp_depth * mtp_module_parameters(m)


def active_parameters(m: Model, *, embedding: bool) -> int:
  """Of the main model's matrices that one token passes; `embedding` counts the input embedding too.

  Vectors are left out, as in the published figures.
  """
  router = (m.num_layers - m.num_dense_layers) * router_parameters(m)
  return _matmul_parameters(m) + router + embedding * embedding_parameters(m)


def training_flops_per_token(
  m: Model, seq_len: int, *, causal: bool = True, mtp: bool = False
) -> float:
  """FLOPs of forward and backward per token: six per weight of a matmul, and the attention's own.

  The published accounting: no router, no input embedding, no recomputation; attention over half of
  `seq_len` keys where `causal`, over all of them where not. `mtp` adds every MTP module's
  projection, block and use of the head.
  """
  flops = 6 * _matmul_parameters(m) + m.num_layers * _attention_flops(m, seq_len, causal)
  if mtp:
    block = attention_parameters(m) + _chosen_experts(m)
    module = projection_parameters(m) + block + embedding_parameters(m)
    flops += m.mtp_depth * (6 * module + _attention_flops(m, seq_len, causal))
  return flops


# ---- what runs in FP8 ----------------------------------------------------------------------------


def fp8_flops_share(m: Model, seq_len: int) -> float:
  """Part of a training step's matmul FLOPs that FP8 GEMMs do, MTP and routers counted; 0 under bf16, fp32.

  Outside are the output head, the routers, MTP's projection and the attention core (causal).
  """
  if not m.precision.startswith('fp8'):
    return 0.0
  moe = m.num_layers - m.num_dense_layers + m.mtp_depth
  linear = (m.num_dense_layers + moe) * attention_parameters(m)
  linear += m.num_dense_layers * ffn_parameters(m) + moe * _chosen_experts(m)
  total = training_flops_per_token(m, seq_len, mtp=True) + 6 * moe * router_parameters(m)
  return 6 * linear / total


def kept_bytes(m: Model) -> tuple[int, int]:
  """(in FP8 or E5M6 with their scales, all) bytes of activations between forward and backward, per token.

  Of all blocks, MTP's included, under remat = 'latents'; rows that came from other devices and the
  empty slots of experts aside.
  """
  a, e, fp8 = m.mla, m.moe, m.precision.startswith('fp8')
  number = 4 if m.precision == 'fp32' else 2
  tiles = lambda dim: -(-dim // 128)
  codes = lambda dim: dim + 4 * tiles(dim) if fp8 else number * dim
  out = a.v_dim + 68 * tiles(a.v_dim) if fp8 else number * a.v_dim  # a head's; E5M6, `kernels/e5m6`
  dense, moe = m.num_dense_layers, m.num_layers - m.num_dense_layers + m.mtp_depth
  attention = (dense + moe) * a.num_heads * out
  hidden = dense * 2 * codes(m.ffn_dim)
  hidden += moe * (e.top_k * 2 * codes(e.expert_dim))
  hidden += moe * 2 * codes(e.num_shared * e.expert_dim) if e.num_shared else 0
  latents = a.q_rank + a.kv_rank + a.rope_dim
  block = number * (2 * m.dim + latents) + 4 * a.num_heads  # input, residual, latents; log-sum-exp
  total = attention + hidden + (dense + moe) * block + moe * 8 * e.top_k  # ids and weights
  return (attention + hidden if fp8 else 0), total


def describe_precision(m: Model, seq_len: int) -> str:
  """'precision: fp8; 87 % of matmul FLOPs in FP8, 72 % of ...'."""
  kept, total = kept_bytes(m)
  if not kept:
    return f'precision: {m.precision}'
  return (
    f'precision: {m.precision}; {100 * fp8_flops_share(m, seq_len):.1f} % of matmul FLOPs in FP8, and '
    f"{100 * kept / total:.1f} % of the {total:,} bytes a token that remat='latents' keeps"
  )


def _chosen_experts(m: Model) -> int:
  """Weights of the experts that one token passes in one layer."""
  return (m.moe.top_k + m.moe.num_shared) * expert_parameters(m)


def _matmul_parameters(m: Model) -> int:
  """Weights of the main model that multiply one token, head included, router not."""
  dense = m.num_dense_layers * ffn_parameters(m)
  moe = (m.num_layers - m.num_dense_layers) * _chosen_experts(m)
  return m.num_layers * attention_parameters(m) + dense + moe + embedding_parameters(m)


def _attention_flops(m: Model, seq_len: int, causal: bool) -> float:
  """Of scores and weighted values in one layer, forward and backward, per token."""
  per_key = m.mla.num_heads * (m.mla.nope_dim + m.mla.rope_dim + m.mla.v_dim)
  return 6.0 * per_key * seq_len / (2 if causal else 1)
