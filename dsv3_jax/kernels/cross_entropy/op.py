"""Sum of weighted cross entropies of `h @ head`, a chunk of tokens at a time.

Where a gradient is wanted, the forward computes it too: of a chunk's logits the loss, then
softmax - onehot, then both gradients, so the logits are made once and never kept (three GEMMs, as
a plain head needs, no recomputation). The backward only scales. Peak memory: `chunk` x V logits.
"""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax

from dsv3_jax import compat


def cross_entropy(
  h_TD: jax.Array,
  head_DV: jax.Array,
  target_T: jax.Array,
  weight_T: jax.Array,
  *,
  chunk: int = 1024,
  implementation: str = 'xla',
) -> jax.Array:
  """Sum over t of weight_t * -log softmax(h_t head)[target_t], a float32 scalar, in nats.

  Differentiable in h and head. Tokens are padded to a multiple of `chunk`. `implementation`: 'xla' or
  'reference' (all logits at once).
  """
  if implementation == 'reference':
    logits_TV = jnp.einsum('TD,DV->TV', h_TD, head_DV, preferred_element_type=jnp.float32)
    at_T1 = jnp.take_along_axis(logits_TV, target_T[:, None], axis=1)
    return jnp.sum(weight_T * (jax.nn.logsumexp(logits_TV, axis=1) - at_T1[:, 0]))
  if implementation != 'xla':
    raise ValueError(f"implementation = {implementation!r}: must be 'xla' or 'reference'")
  tokens = len(target_T)
  chunk = min(chunk, tokens)
  pad = -tokens % chunk
  chunks = lambda x: rearrange(
    jnp.pad(x, ((0, pad),) + ((0, 0),) * (x.ndim - 1)), '(c t) ... -> c t ...', t=chunk
  )
  return _chunked(chunks(h_TD), head_DV, chunks(target_T), chunks(weight_T))


def _loss(h_tD, head_DV, target_t, weight_t):
  logits_tV = jnp.einsum('tD,DV->tV', h_tD, head_DV, preferred_element_type=jnp.float32)
  lse_t = jax.nn.logsumexp(logits_tV, axis=1)
  at_t1 = jnp.take_along_axis(logits_tV, target_t[:, None], axis=1)
  return jnp.sum(weight_t * (lse_t - at_t1[:, 0])), logits_tV, lse_t


@jax.custom_vjp
def _chunked(h_ctD, head_DV, target_ct, weight_ct):
  def one(total, chunk):
    h_tD, target_t, weight_t = chunk
    return total + _loss(h_tD, head_DV, target_t, weight_t)[0], None

  zero = compat.zeros_like_varying((), jnp.float32, h_ctD, head_DV, target_ct, weight_ct)
  return lax.scan(one, zero, (h_ctD, target_ct, weight_ct))[0]


def _forward(h_ctD, head_DV, target_ct, weight_ct):
  dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

  def one(carry, chunk):
    total, dhead_DV = carry
    h_tD, target_t, weight_t = chunk
    loss, logits_tV, lse_t = _loss(h_tD, head_DV, target_t, weight_t)
    hit_tV = jnp.arange(logits_tV.shape[1], dtype=target_t.dtype)[None, :] == target_t[:, None]
    dlogits_tV = (jnp.exp(logits_tV - lse_t[:, None]) - hit_tV.astype(jnp.float32)) * weight_t[
      :, None
    ]
    dlogits_tV = dlogits_tV.astype(head_DV.dtype)
    dh_tD = jnp.einsum('tV,DV->tD', dlogits_tV, head_DV)
    return (total + loss, dhead_DV + dot('tD,tV->DV', h_tD, dlogits_tV)), dh_tD

  zeros = lambda shape: compat.zeros_like_varying(
    shape, jnp.float32, h_ctD, head_DV, target_ct, weight_ct
  )
  (total, dhead_DV), dh_ctD = lax.scan(
    one, (zeros(()), zeros(head_DV.shape)), (h_ctD, target_ct, weight_ct)
  )
  return total, (dh_ctD, dhead_DV.astype(head_DV.dtype))


def _backward(residuals, dtotal):
  dh_ctD, dhead_DV = residuals
  return dh_ctD * dtotal.astype(dh_ctD.dtype), dhead_DV * dtotal.astype(dhead_DV.dtype), None, None


_chunked.defvjp(_forward, _backward)
