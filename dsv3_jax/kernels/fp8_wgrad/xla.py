"""Dequantised by tiles, then one float32 dot."""

import jax
import jax.numpy as jnp

from dsv3_jax.kernels.quantize.xla import dequantize_tiles


def fp8_wgrad(
  a_MT: jax.Array,
  a_scale_Mt: jax.Array,
  b_NT: jax.Array,
  b_scale_Nt: jax.Array,
  *,
  accumulate: jax.Array | None,
) -> jax.Array:
  a_MT = dequantize_tiles(a_MT, a_scale_Mt, jnp.float32)
  b_NT = dequantize_tiles(b_NT, b_scale_Nt, jnp.float32)
  out_MN = jnp.einsum('MT,NT->MN', a_MT, b_NT)
  return out_MN if accumulate is None else accumulate + out_MN
