"""Every weight on every row, and a mask."""

import jax
import jax.numpy as jnp

from dsv3_jax.kernels import tiles
from dsv3_jax.kernels.fp8_matmul.reference import fp8_matmul
from dsv3_jax.kernels.grouped_matmul.op import aligned_starts


def grouped_matmul(
  a_SK: jax.Array,
  a_scale_SS: jax.Array,
  b_ENK: jax.Array,
  b_scale_Ens: jax.Array,
  group_sizes_E: jax.Array,
  *,
  out_dtype: jnp.dtype,
) -> jax.Array:
  S, (E, N, _) = a_SK.shape[0], b_ENK.shape
  start_E = aligned_starts(group_sizes_E)
  end_E = start_E + -(-group_sizes_E // tiles.TILE) * tiles.TILE
  row_S = jnp.arange(S, dtype=jnp.int32)
  out_SN = jnp.zeros((S, N), jnp.float32)
  for e in range(E):
    rows_SN = fp8_matmul(a_SK, a_scale_SS, b_ENK[e], b_scale_Ens[e], out_dtype=jnp.float32)
    mine_S = (row_S >= start_E[e]) & (row_S < end_E[e])
    out_SN = jnp.where(mine_S[:, None], rows_SN, out_SN)
  return out_SN.astype(out_dtype)


def masked_matmul(
  a_EMK: jax.Array,
  a_scale_EMS: jax.Array,
  b_ENK: jax.Array,
  b_scale_Ens: jax.Array,
  sizes_E: jax.Array,
  *,
  out_dtype: jnp.dtype,
) -> jax.Array:
  operands = zip(a_EMK, a_scale_EMS, b_ENK, b_scale_Ens, strict=True)
  out_EMN = jnp.stack([fp8_matmul(*each, out_dtype=out_dtype) for each in operands])
  row_M = jnp.arange(a_EMK.shape[1], dtype=jnp.int32)
  return jnp.where((row_M[None] < sizes_E[:, None])[:, :, None], out_EMN, 0)
