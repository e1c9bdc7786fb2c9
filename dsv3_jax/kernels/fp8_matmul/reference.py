"""The definition, block of K by block of K."""

import jax
import jax.numpy as jnp

from dsv3_jax.kernels import tiles


def fp8_matmul(
  a_MK: jax.Array,
  a_scale_MS: jax.Array,
  b_NK: jax.Array,
  b_scale_ns: jax.Array,
  *,
  out_dtype: jnp.dtype,
) -> jax.Array:
  N, K = b_NK.shape
  out_MN = jnp.zeros((a_MK.shape[0], N), jnp.float32)
  for s, start in enumerate(range(0, K, tiles.TILE)):
    a_MH, b_NH = (x[:, start : start + tiles.TILE].astype(jnp.float32) for x in (a_MK, b_NK))
    b_scale_N = jnp.repeat(b_scale_ns[:, s], tiles.TILE)[:N]
    out_MN += jnp.einsum('MH,NH->MN', a_MH, b_NH) * a_scale_MS[:, s, None] * b_scale_N[None]
  return out_MN.astype(out_dtype)
