"""The definition, block of tokens by block of tokens."""

import jax
import jax.numpy as jnp

from dsv3_jax.kernels import tiles


def fp8_wgrad(
  a_MT: jax.Array,
  a_scale_Mt: jax.Array,
  b_NT: jax.Array,
  b_scale_Nt: jax.Array,
  *,
  accumulate: jax.Array | None,
) -> jax.Array:
  out_MN = jnp.zeros((a_MT.shape[0], b_NT.shape[0]), jnp.float32)
  for t, start in enumerate(range(0, a_MT.shape[1], tiles.TILE)):
    a_MH, b_NH = (x[:, start : start + tiles.TILE].astype(jnp.float32) for x in (a_MT, b_NT))
    part_MN = jnp.einsum('MH,NH->MN', a_MH, b_NH)
    out_MN += part_MN * a_scale_Mt[:, t, None] * b_scale_Nt[None, :, t]
  return out_MN if accumulate is None else accumulate + out_MN
