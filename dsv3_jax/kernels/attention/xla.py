"""Blockwise causal attention in plain XLA, with its own backward.

Only pairs (i, j) of a query block and a key block with j <= i are visited, by one scan whose body is
compiled once; a running maximum and sum carry the softmax over the pairs of a row. Where there are few
query blocks, each visits all its keys in one go, without a loop: XLA:CPU runs a batch of small matmuls
on one core, and only what no loop holds together on several (both passes at 4 heads of 256 tokens: 35
ms so, 58 ms by the scan). The forward keeps the output and the log-sum-exp, named `attn_out` and
`attn_lse` for remat policies; the backward makes the same visits and rebuilds the probabilities.
Memory: O(B N (L H + block^2)).

Layout: heads first, [B, N, L, H].
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax import compat
from dsv3_jax.kernels import e5m6

_FEW = 4  # query blocks up to which there is no loop over them


def _visit_all(visit: Callable[..., Any], carry: Any, length: int, block: int) -> Any:
  """carry = visit(carry, first query, first key, keys), over `block` queries each, all causal pairs."""
  if length // block <= _FEW:
    for i in range(0, length, block):
      carry = visit(carry, i, 0, i + block)
    return carry
  i, j = np.tril_indices(length // block)  # row by row
  pairs = (jnp.asarray(i * block, jnp.int32), jnp.asarray(j * block, jnp.int32))
  return lax.scan(lambda carry, pair: (visit(carry, *pair, block), None), carry, pairs)[0]


def _scores(
  q_BNlJ: jax.Array, k_BNmJ: jax.Array, i: jax.Array, j: jax.Array, scale: float
) -> jax.Array:
  """Scaled scores of the queries from position i on with the keys from j on, causal."""
  score_BNlm = jnp.einsum('BNlJ,BNmJ->BNlm', q_BNlJ, k_BNmJ, preferred_element_type=jnp.float32)
  row_l1 = i + jnp.arange(q_BNlJ.shape[2], dtype=jnp.int32)[:, None]
  col_1m = j + jnp.arange(k_BNmJ.shape[2], dtype=jnp.int32)[None, :]
  # Finite, so that no row of a block is all -inf: exp(-inf - -inf) would be NaN.
  return jnp.where((row_l1 >= col_1m)[None, None], score_BNlm * scale, -1e30)


def _cut(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
  return lax.dynamic_slice_in_dim(x, start, size, axis=2)


def _put(x: jax.Array, update: jax.Array, start: jax.Array) -> jax.Array:
  return lax.dynamic_update_slice_in_dim(x, update, start, axis=2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def attention(
  q_BNLJ: jax.Array, k_BNLJ: jax.Array, v_BNLV: jax.Array, scale: float, block: int, stored: str
) -> jax.Array:
  """[B, N, L, V]; L must be a multiple of `block`."""
  return _forward(q_BNLJ, k_BNLJ, v_BNLV, scale, block, stored)[0]


def _forward(q_BNLJ, k_BNLJ, v_BNLV, scale, block, stored):
  B, N, L, _ = q_BNLJ.shape
  V = v_BNLV.shape[-1]
  like = (q_BNLJ, k_BNLJ, v_BNLV)
  out_BNLV = compat.zeros_like_varying((B, N, L, V), jnp.float32, *like)
  sum_BNL1 = compat.zeros_like_varying((B, N, L, 1), jnp.float32, *like)
  max_BNL1 = sum_BNL1 - 1e30

  def visit(carry, i, j, keys):
    out_BNLV, sum_BNL1, max_BNL1 = carry
    score_BNlm = _scores(_cut(q_BNLJ, i, block), _cut(k_BNLJ, j, keys), i, j, scale)
    old_max = _cut(max_BNL1, i, block)
    new_max = jnp.maximum(old_max, score_BNlm.max(-1, keepdims=True))
    shrink = jnp.exp(old_max - new_max)
    prob_BNlm = jnp.exp(score_BNlm - new_max)
    new_sum = _cut(sum_BNL1, i, block) * shrink + prob_BNlm.sum(-1, keepdims=True)
    part_BNlV = jnp.einsum(
      'BNlm,BNmV->BNlV',
      prob_BNlm.astype(v_BNLV.dtype),
      _cut(v_BNLV, j, keys),
      preferred_element_type=jnp.float32,
    )
    new_out = _cut(out_BNLV, i, block) * shrink + part_BNlV
    return _put(out_BNLV, new_out, i), _put(sum_BNL1, new_sum, i), _put(max_BNL1, new_max, i)

  start = (out_BNLV, sum_BNL1, max_BNL1)
  out_BNLV, sum_BNL1, max_BNL1 = _visit_all(visit, start, L, block)
  out_BNLV = (out_BNLV / sum_BNL1).astype(v_BNLV.dtype)
  kept = checkpoint_name(e5m6.encode(out_BNLV) if stored == 'e5m6' else out_BNLV, 'attn_out')
  out_BNLV = _opened(kept, v_BNLV, stored)
  lse_BNL1 = checkpoint_name(max_BNL1 + jnp.log(sum_BNL1), 'attn_lse')
  return out_BNLV, (q_BNLJ, k_BNLJ, v_BNLV, kept, lse_BNL1)


def _opened(kept, v_BNLV, stored):
  """The output out of what is kept of it."""
  if stored == 'e5m6':
    return e5m6.decode(*kept, v_BNLV.shape[-1], v_BNLV.dtype)
  return kept


def _backward(scale, block, stored, residuals, dout_BNLV):
  q_BNLJ, k_BNLJ, v_BNLV, kept, lse_BNL1 = residuals
  out_BNLV = _opened(kept, v_BNLV, stored)
  dtype = v_BNLV.dtype
  # Sum over keys of prob * dprob, which the softmax's derivative subtracts.
  delta_BNL1 = jnp.sum(
    dout_BNLV.astype(jnp.float32) * out_BNLV.astype(jnp.float32), axis=-1, keepdims=True
  )
  zeros = lambda x: compat.zeros_like_varying(
    x.shape, jnp.float32, q_BNLJ, k_BNLJ, v_BNLV, dout_BNLV
  )

  def visit(carry, i, j, keys):
    dq_BNLJ, dk_BNLJ, dv_BNLV = carry
    q_BNlJ, k_BNmJ, v_BNmV = _cut(q_BNLJ, i, block), _cut(k_BNLJ, j, keys), _cut(v_BNLV, j, keys)
    dout_BNlV = _cut(dout_BNLV, i, block)
    prob_BNlm = jnp.exp(_scores(q_BNlJ, k_BNmJ, i, j, scale) - _cut(lse_BNL1, i, block))
    dprob_BNlm = jnp.einsum(
      'BNlV,BNmV->BNlm', dout_BNlV, v_BNmV, preferred_element_type=jnp.float32
    )
    dscore_BNlm = (prob_BNlm * (dprob_BNlm - _cut(delta_BNL1, i, block)) * scale).astype(dtype)
    add = lambda total, start, part: _put(total, _cut(total, start, part.shape[2]) + part, start)
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    return (
      add(dq_BNLJ, i, dot('BNlm,BNmJ->BNlJ', dscore_BNlm, k_BNmJ)),
      add(dk_BNLJ, j, dot('BNlm,BNlJ->BNmJ', dscore_BNlm, q_BNlJ)),
      add(dv_BNLV, j, dot('BNlm,BNlV->BNmV', prob_BNlm.astype(dtype), dout_BNlV)),
    )

  start = (zeros(q_BNLJ), zeros(k_BNLJ), zeros(v_BNLV))
  grads = _visit_all(visit, start, q_BNLJ.shape[2], block)
  return tuple(g.astype(dtype) for g in grads)


attention.defvjp(_forward, _backward)
