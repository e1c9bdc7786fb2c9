"""The model of the DeepSeek-V3 report in NumPy float64: slow, plain, the yardstick of the tests.

One token, one head, one expert at a time, in the order of the report; sections and equation numbers
are those of arXiv 2412.19437. Where it leaves a choice open, the docstring says which one is taken.
FP8 and LogFMT stand in `oracle_precision.py`.

Weights are plain dicts of float64 arrays; `random_weights` shows every name and shape. Letters:
L positions of one sequence, X those of an MTP module, M cached ones, T tokens, D model, N heads,
Q and C query and key-value rank, H nope, R rope, J = H + R, V value dimension in attention and
vocabulary elsewhere, E routed experts, G groups, K chosen ones, F hidden width.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dsv3_jax.config import Model, Moe, Optimizer

Array = np.ndarray
Weights = dict[str, Any]
Routing = tuple[Array, Array]  # ids_TK, affinity_TE


# ---- elementary functions ------------------------------------------------------------------------


def rms_norm(x_D: Array, weight_D: Array, eps: float) -> Array:
  """x / sqrt(mean(x^2) + eps) * weight over the last axis."""
  return x_D / np.sqrt(np.mean(x_D**2, axis=-1, keepdims=True) + eps) * weight_D


def softmax(x: Array) -> Array:
  e = np.exp(x - np.max(x))
  return e / np.sum(e)


def sigmoid(x: Array) -> Array:
  return 1 / (1 + np.exp(-x))


def swiglu(x_D: Array, gate_DF: Array, up_DF: Array, down_FD: Array) -> Array:
  """down(silu(gate x) * up x), silu(a) = a sigmoid(a)."""
  gate_F = x_D @ gate_DF
  return (gate_F * sigmoid(gate_F) * (x_D @ up_DF)) @ down_FD


# ---- rotary embedding with YaRN (4.3) ------------------------------------------------------------


def yarn_on(cfg: Model) -> bool:
  return cfg.max_length > cfg.rope.original_length


def yarn_range(cfg: Model) -> tuple[int, int]:
  """(low, high): pairs up to low keep their frequency, those from high on go `factor` slower."""
  r, dim = cfg.rope, cfg.mla.rope_dim

  def pair_that_turns(turns: float) -> float:  # this often within the original length
    return dim * math.log(r.original_length / (2 * math.pi * turns)) / (2 * math.log(r.theta))

  low = max(math.floor(pair_that_turns(r.beta_fast)), 0)
  high = min(math.ceil(pair_that_turns(r.beta_slow)), dim - 1)
  return low, high


def yarn_frequencies(cfg: Model) -> Array:
  """[R / 2] radians per position of each pair; without YaRN theta^(-2j/R)."""
  dim = cfg.mla.rope_dim
  frequencies = np.zeros(dim // 2)
  for j in range(dim // 2):
    frequencies[j] = cfg.rope.theta ** (-2 * j / dim)
    if yarn_on(cfg):
      low, high = yarn_range(cfg)
      width = high - low if high > low else 0.001  # the released code's way round a zero width
      slowed = min(max((j - low) / width, 0.0), 1.0)
      frequencies[j] *= (1 - slowed) + slowed / cfg.rope.factor
  return frequencies


def yarn_mscale(cfg: Model, mscale: float) -> float:
  """m(mscale) = 0.1 mscale ln(factor) + 1; the report's sqrt(t). 1 where YaRN is off."""
  return 0.1 * mscale * math.log(cfg.rope.factor) + 1 if yarn_on(cfg) else 1.0


def softmax_scale(cfg: Model) -> float:
  """(H + R)^-0.5, times m(mscale_all_dim)^2 under YaRN."""
  width = cfg.mla.nope_dim + cfg.mla.rope_dim
  return width**-0.5 * yarn_mscale(cfg, cfg.rope.mscale_all_dim) ** 2


def rope(cfg: Model, x_R: Array, position: int) -> Array:
  """Rotates the adjacent pairs (2j, 2j + 1) of the last axis by position * frequency_j."""
  m = yarn_mscale(cfg, cfg.rope.mscale) / yarn_mscale(cfg, cfg.rope.mscale_all_dim)
  out_R = np.zeros_like(x_R)
  for j, frequency in enumerate(yarn_frequencies(cfg)):
    cos, sin = m * math.cos(position * frequency), m * math.sin(position * frequency)
    even, odd = x_R[..., 2 * j], x_R[..., 2 * j + 1]
    out_R[..., 2 * j] = even * cos - odd * sin
    out_R[..., 2 * j + 1] = even * sin + odd * cos
  return out_R


# ---- Multi-head Latent Attention (2.1.1) ---------------------------------------------------------


def mla_query(cfg: Model, w: Weights, x_D: Array, position: int) -> Array:
  """q_NJ of one token, nope part first (eq 6-9). Without query compression q = W^Q x."""
  if cfg.mla.q_rank:
    c_Q = rms_norm(
      x_D @ w['q_down_DQ'], w['q_norm_Q'], cfg.norm_eps
    )  # 6, and the extra norm of 4.2
    q_NJ = np.einsum('Q,QNJ->NJ', c_Q, w['q_up_QNJ'])  # 7 and, before its rotation, 8
  else:
    q_NJ = np.einsum('D,DNJ->NJ', x_D, w['q_DNJ'])
  H = cfg.mla.nope_dim
  return np.concatenate([q_NJ[:, :H], rope(cfg, q_NJ[:, H:], position)], axis=1)  # 8, 9


def mla_latent(cfg: Model, w: Weights, x_D: Array, position: int) -> tuple[Array, Array]:
  """What is cached of one token: c_C after its norm (eq 1), k_rope_R after its rotation (eq 3)."""
  c_C = rms_norm(x_D @ w['kv_down_DC'], w['kv_norm_C'], cfg.norm_eps)
  return c_C, rope(cfg, x_D @ w['k_rope_DR'], position)


def mla(cfg: Model, w: Weights, x_LD: Array) -> Array:
  """Causal attention of one sequence, keys and values expanded per head. Returns [L, D]."""
  scale = softmax_scale(cfg)
  latents = [mla_latent(cfg, w, x_D, t) for t, x_D in enumerate(x_LD)]
  out_LD = np.zeros_like(x_LD)
  for t, x_D in enumerate(x_LD):
    q_NJ = mla_query(cfg, w, x_D, t)
    for n in range(cfg.mla.num_heads):
      score_M, value_MV = [], []
      for c_C, k_rope_R in latents[: t + 1]:  # itself and the past
        k_J = np.concatenate([c_C @ w['k_up_CNH'][:, n], k_rope_R])  # 2, 4
        score_M.append(scale * (q_NJ[n] @ k_J))
        value_MV.append(c_C @ w['v_up_CNV'][:, n])  # 5
      o_V = softmax(np.array(score_M)) @ np.array(value_MV)  # 10
      out_LD[t] += o_V @ w['out_NVD'][n]  # 11
  return out_LD


def mla_absorbed(
  cfg: Model, w: Weights, x_D: Array, latent_MC: Array, k_rope_MR: Array
) -> tuple[Array, Array, Array]:
  """One decoding step of the token at position M over a cache of M latents.

  W^UK moves onto the query and W^UV behind the weighted sum, so that no key or value is expanded.
  Returns (out_D, latent, k_rope), the caches one row longer.
  """
  H, position = cfg.mla.nope_dim, len(latent_MC)
  c_C, k_rope_R = mla_latent(cfg, w, x_D, position)
  latent_MC = np.concatenate([latent_MC, c_C[None]])
  k_rope_MR = np.concatenate([k_rope_MR, k_rope_R[None]])
  q_NJ = mla_query(cfg, w, x_D, position)
  out_D = np.zeros_like(x_D)
  for n in range(cfg.mla.num_heads):
    q_C = w['k_up_CNH'][:, n] @ q_NJ[n, :H]
    score_M = softmax_scale(cfg) * (latent_MC @ q_C + k_rope_MR @ q_NJ[n, H:])
    o_C = softmax(score_M) @ latent_MC
    out_D += o_C @ w['v_up_CNV'][:, n] @ w['out_NVD'][n]
  return out_D, latent_MC, k_rope_MR


# ---- DeepSeekMoE (2.1.2) -------------------------------------------------------------------------


def largest(x: Array, k: int) -> list[int]:
  """Indices of the k largest entries, largest first; of equal ones the lower index first."""
  return sorted(range(len(x)), key=lambda i: (-x[i], i))[:k]


def route(cfg: Moe, x_TD: Array, router_DE: Array, bias_E: Array) -> tuple[Array, Array, Array]:
  """Chosen experts of each token: (ids_TK by falling selection score, weights_TK, affinity_TE).

  sigmoid (V3): affinity s = sigmoid(x . e) (eq 15), selection by s + bias (eq 16), a group ranked
  by the sum of its two best. softmax (V2): s = softmax(x . e), selection by s, the bias is not
  used, a group ranked by its best. The weight is always the unbiased s, divided by the sum over
  the chosen ones if `normalize` (eq 13), times `route_scale`. Experts outside the kept groups are
  out (-inf, not 0, which would beat a negative s + bias).
  """
  T, (E, G, K) = len(x_TD), (cfg.num_experts, cfg.num_groups, cfg.top_k)
  ids_TK, weights_TK = np.zeros((T, K), int), np.zeros((T, K))
  affinity_TE = np.zeros((T, E))
  for t in range(T):
    logits_E = x_TD[t] @ router_DE
    if cfg.scoring == 'sigmoid':
      s_E = sigmoid(logits_E)
      selection_E, best_of_group = s_E + bias_E, 2
    else:
      s_E = softmax(logits_E)
      selection_E, best_of_group = s_E.copy(), 1
    if G > 1:
      group_score_G = [sum(sorted(group)[-best_of_group:]) for group in np.split(selection_E, G)]
      kept = largest(np.array(group_score_G), cfg.top_groups)
      outside = [e for e in range(E) if e // (E // G) not in kept]
      selection_E[outside] = -np.inf
    ids_K = largest(selection_E, K)
    weights_K = s_E[ids_K]
    if cfg.normalize:
      weights_K = weights_K / np.sum(weights_K)
    ids_TK[t], weights_TK[t], affinity_TE[t] = ids_K, cfg.route_scale * weights_K, s_E
  return ids_TK, weights_TK, affinity_TE


def moe(cfg: Moe, w: Weights, x_TD: Array) -> tuple[Array, Array, Array]:
  """(out_TD, ids_TK, affinity_TE): eq 12 without the residual. No token is dropped."""
  ids_TK, weights_TK, affinity_TE = route(cfg, x_TD, w['router_DE'], w['bias_E'])
  out_TD = np.zeros_like(x_TD)
  for t, x_D in enumerate(x_TD):
    if cfg.num_shared:
      out_TD[t] += swiglu(x_D, **w['shared'])
    for e, g in zip(ids_TK[t], weights_TK[t], strict=True):
      out_TD[t] += g * swiglu(x_D, w['gate_EDF'][e], w['up_EDF'][e], w['down_EFD'][e])
  return out_TD, ids_TK, affinity_TE


def balance_loss(affinity_TE: Array, top_k: int) -> float:
  """Sequence-wise balance loss of one sequence, alpha left out (eq 17-20).

  f_i counts the tokens that have i among the top K of the unbiased affinities, groups ignored, as
  eq 18 is written; P_i is the mean share of i in the affinities. 1 when perfectly balanced.
  """
  T, E = affinity_TE.shape
  f_E, P_E = np.zeros(E), np.zeros(E)
  for s_E in affinity_TE:
    f_E[largest(s_E, top_k)] += E / (top_k * T)  # 18
    P_E += s_E / np.sum(s_E) / T  # 19, 20
  return float(f_E @ P_E)  # 17


def expert_counts(ids_TK: Array, num_experts: int) -> Array:
  """[E] how many tokens chose each expert."""
  counts_E = np.zeros(num_experts, int)
  for e in ids_TK.flat:
    counts_E[e] += 1
  return counts_E


def update_bias(bias_E: Array, counts_E: Array, gamma: float) -> Array:
  """Auxiliary-loss-free balancing: overloaded experts go down by gamma, underloaded ones up.

  Counts are those of the whole batch. At exactly the mean nothing moves (open in the report).
  """
  return bias_E + gamma * np.sign(np.mean(counts_E) - counts_E)


# ---- transformer and multi-token prediction (2.2) ------------------------------------------------


def block(cfg: Model, w: Weights, x_LD: Array) -> tuple[Array, Routing | None]:
  """Pre-norm block; the feed-forward part is a MoE where the weights hold a router."""
  x_LD = x_LD + mla(cfg, w['attn'], rms_norm(x_LD, w['attn_norm_D'], cfg.norm_eps))
  u_LD = rms_norm(x_LD, w['ffn_norm_D'], cfg.norm_eps)
  if 'router_DE' in w['ffn']:
    out_LD, ids_TK, affinity_TE = moe(cfg.moe, w['ffn'], u_LD)
    return x_LD + out_LD, (ids_TK, affinity_TE)
  return x_LD + swiglu(u_LD, **w['ffn']), None


def transformer(cfg: Model, w: Weights, tokens_L: Array) -> tuple[Array, Array, list[Routing]]:
  """One sequence: (logits_LV, hidden_LD after the final norm, routing per MoE layer)."""
  x_LD = w['embed_VD'][tokens_L]
  routing = []
  for layer in w['dense_layers']:
    x_LD, _ = block(cfg, layer, x_LD)
  for layer in w['moe_layers']:
    x_LD, chosen = block(cfg, layer, x_LD)
    routing.append(chosen)
  hidden_LD = rms_norm(x_LD, w['final_norm_D'], cfg.norm_eps)
  return hidden_LD @ w['head_DV'], hidden_LD, routing


def mtp(cfg: Model, w: Weights, row: Array, hidden_LD: Array) -> tuple[list[Array], list[Routing]]:
  """MTP modules on one row of L + 1 tokens: logits [L - k, V] and routing for each depth k = 1..D.

  Position i of depth k sees row[: i + k + 1] and predicts row[i + k + 1]. Done the way
  the released weights are served: the embedding comes first in the concatenation, unlike eq 21; h^0
  (open in the report) is the main hidden state after its norm, h^k the module's after its own.
  """
  L, eps = len(row) - 1, cfg.norm_eps
  all_logits, routing = [], []
  for k, module in enumerate(w['mtp'], start=1):
    x_XD = np.zeros((L - k, cfg.dim))
    for i in range(L - k):
      embed_D = rms_norm(w['embed_VD'][row[i + k]], module['embed_norm_D'], eps)
      h_D = rms_norm(hidden_LD[i], module['hidden_norm_D'], eps)
      x_XD[i] = np.concatenate([embed_D, h_D]) @ module['proj_DD']  # 21
    x_XD, chosen = block(cfg, module['block'], x_XD)  # 22, positions count from 0
    hidden_LD = rms_norm(x_XD, module['out_norm_D'], eps)
    all_logits.append(hidden_LD @ w['head_DV'])  # 23
    routing.append(chosen)
  return all_logits, routing


# ---- objective -----------------------------------------------------------------------------------


def cross_entropy(logits_LV: Array, targets_L: Array) -> Array:
  """[L] -log p(target), natural logarithm."""
  loss_L = np.zeros(len(targets_L))
  for t, target in enumerate(targets_L):
    top = np.max(logits_LV[t])
    loss_L[t] = top + np.log(np.sum(np.exp(logits_LV[t] - top))) - logits_LV[t, target]
  return loss_L


def objective(
  cfg: Model, w: Weights, tokens: Array, mtp_weight: float, balance_alpha: float
) -> dict[str, Any]:
  """Loss of a batch of rows [B, L + 1]: row[:L] predicts row[1:].

  loss = ce + mtp_weight / D * sum_k mtp[k] (eq 25) + balance_alpha * balance, where ce is the mean
  over B L targets; mtp[k - 1], of depth k, sums over the L - k positions that have a target and
  divides by L (eq 24), then takes the mean over rows; balance is the mean over rows of the sum over
  all MoE layers, MTP blocks included, whose sequences are L - k long. counts: [E] per MoE layer
  over the whole batch, main layers first, then MTP blocks.
  """
  B, L = len(tokens), tokens.shape[1] - 1
  D, E = cfg.mtp_depth, cfg.moe.num_experts
  ce, balance, mtp_k = 0.0, 0.0, [0.0] * D
  counts = [np.zeros(E, int) for _ in range(len(w['moe_layers']) + D)]
  for row in tokens:
    logits_LV, hidden_LD, routing = transformer(cfg, w, row[:L])
    ce += np.sum(cross_entropy(logits_LV, row[1:])) / (B * L)
    mtp_logits, mtp_routing = mtp(cfg, w, row, hidden_LD)
    for k, logits_XV in enumerate(mtp_logits, start=1):
      mtp_k[k - 1] += np.sum(cross_entropy(logits_XV, row[k + 1 :])) / L / B
    for layer, (ids_TK, affinity_TE) in enumerate(routing + mtp_routing):
      balance += balance_loss(affinity_TE, cfg.moe.top_k) / B
      counts[layer] += expert_counts(ids_TK, E)
  loss = ce + balance_alpha * balance + (mtp_weight / D * sum(mtp_k) if D else 0.0)
  return {'loss': loss, 'ce': ce, 'mtp': mtp_k, 'balance': balance, 'counts': counts}


# ---- optimizer (4.2) -----------------------------------------------------------------------------


def learning_rate(cfg: Optimizer, tokens: float, step: int) -> float:
  """Rate after `step` steps and `tokens` tokens: four phases by tokens, times warm-up from 0."""
  decay_end = cfg.constant_tokens + cfg.decay_tokens
  if tokens < cfg.constant_tokens:
    rate = cfg.peak_lr
  elif tokens < decay_end:
    done = (tokens - cfg.constant_tokens) / cfg.decay_tokens
    rate = cfg.end_lr + (cfg.peak_lr - cfg.end_lr) * (1 + math.cos(math.pi * done)) / 2
  elif tokens < decay_end + cfg.end_tokens:
    rate = cfg.end_lr
  else:
    rate = cfg.final_lr
  return rate * step / cfg.warmup_steps if step < cfg.warmup_steps else rate


def clip_gradients(grads: Sequence[Array], clip_norm: float) -> list[Array]:
  """Scales all of them together so that their joint norm is at most `clip_norm`."""
  norm = math.sqrt(sum(float(np.sum(g**2)) for g in grads))
  return [g * clip_norm / norm if norm > clip_norm else g for g in grads]


def adamw(
  cfg: Optimizer, param: Array, grad: Array, moments: tuple, step: int, rate: float, decay: bool
) -> tuple[Array, tuple[Array, Array]]:
  """Update `step` (1 is the first) of one array: (param, (first, second)). Decay is decoupled."""
  first = cfg.beta1 * moments[0] + (1 - cfg.beta1) * grad
  second = cfg.beta2 * moments[1] + (1 - cfg.beta2) * grad**2
  mean = first / (1 - cfg.beta1**step)
  spread = np.sqrt(second / (1 - cfg.beta2**step)) + cfg.eps
  pull = cfg.weight_decay * param if decay else 0.0
  return param - rate * (mean / spread + pull), (first, second)


# ---- for tests -----------------------------------------------------------------------------------


def random_weights(cfg: Model, rng: np.random.Generator) -> Weights:
  """All weights, at a scale where every part matters; each value is exact in float32 too.

  Matrices have variance 1 / fan-in, norms lie around 1, router biases reorder the experts.
  """

  def normal(mean: float, std: float, *shape: int) -> Array:
    return rng.normal(mean, std, shape).astype(np.float32).astype(np.float64)

  def matrix(fan_in: int, *shape: int) -> Array:
    return normal(0, fan_in**-0.5, *shape)

  def norm(width: int) -> Array:
    return normal(1, 0.1, width)

  D, m, e = cfg.dim, cfg.mla, cfg.moe
  N, Q, C, H, R, V = m.num_heads, m.q_rank, m.kv_rank, m.nope_dim, m.rope_dim, m.v_dim

  def attention() -> Weights:
    w = {'q_DNJ': matrix(D, D, N, H + R)}
    if Q:
      w = {'q_down_DQ': matrix(D, D, Q), 'q_norm_Q': norm(Q), 'q_up_QNJ': matrix(Q, Q, N, H + R)}
    w |= {'kv_down_DC': matrix(D, D, C), 'k_rope_DR': matrix(D, D, R), 'kv_norm_C': norm(C)}
    w |= {'k_up_CNH': matrix(C, C, N, H), 'v_up_CNV': matrix(C, C, N, V)}
    return w | {'out_NVD': matrix(N * V, N, V, D)}

  def ffn(F: int) -> Weights:
    return {'gate_DF': matrix(D, D, F), 'up_DF': matrix(D, D, F), 'down_FD': matrix(F, F, D)}

  def experts() -> Weights:
    E, F = e.num_experts, e.expert_dim
    w = {'router_DE': matrix(D, D, E), 'bias_E': normal(0, 0.1, E)}
    w |= {'gate_EDF': matrix(D, E, D, F), 'up_EDF': matrix(D, E, D, F)}
    w |= {'down_EFD': matrix(F, E, F, D)}
    return w | ({'shared': ffn(e.num_shared * F)} if e.num_shared else {})

  def layer(feed_forward: Weights) -> Weights:
    norms = {'attn_norm_D': norm(D), 'ffn_norm_D': norm(D)}
    return norms | {'attn': attention(), 'ffn': feed_forward}

  def module() -> Weights:
    norms = {'hidden_norm_D': norm(D), 'embed_norm_D': norm(D), 'out_norm_D': norm(D)}
    return norms | {'proj_DD': matrix(2 * D, 2 * D, D), 'block': layer(experts())}

  return {
    'embed_VD': normal(0, 1, cfg.vocab_size, D),
    'dense_layers': [layer(ffn(cfg.ffn_dim)) for _ in range(cfg.num_dense_layers)],
    'moe_layers': [layer(experts()) for _ in range(cfg.num_layers - cfg.num_dense_layers)],
    'final_norm_D': norm(D),
    'head_DV': matrix(D, D, cfg.vocab_size),
    'mtp': [module() for _ in range(cfg.mtp_depth)],
  }


def numerical_gradient(
  f: Callable[[Array], float], x: Array, indices: Sequence[tuple[int, ...]], eps: float = 1e-5
) -> Array:
  """Central differences of f at the given entries of x, error O(eps^2).

  x is changed in place while f runs and then restored, so f may also read it from the weights that
  x is part of. Choose entries whose move changes no routing decision.
  """
  gradient = np.zeros(len(indices))
  for n, index in enumerate(indices):
    kept = x[index]
    x[index] = kept + eps
    above = f(x)
    x[index] = kept - eps
    below = f(x)
    x[index] = kept
    gradient[n] = (above - below) / (2 * eps)
  return gradient
