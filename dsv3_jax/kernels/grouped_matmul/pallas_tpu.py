"""On TPU: blocks of 128 rows, each told its expert and its rows before the kernel starts."""

import jax
import jax.numpy as jnp

from dsv3_jax.kernels import tiles, tpu, tpu_gemm

supports = tpu.supports


def grouped_matmul(
  a_SK: jax.Array,
  a_scale_SS: jax.Array,
  b_ENK: jax.Array,
  b_scale_Ens: jax.Array,
  group_sizes_E: jax.Array,
  *,
  out_dtype: jnp.dtype,
) -> jax.Array:
  end_E = jnp.cumsum((group_sizes_E + (tiles.TILE - 1)) // tiles.TILE)
  block_s = jnp.arange(len(a_SK) // tiles.TILE, dtype=jnp.int32)
  expert_s = jnp.sum(end_E[None] <= block_s[:, None], axis=1, dtype=jnp.int32)
  rows_s = jnp.where(block_s < end_E[-1], tiles.TILE, 0)
  expert_s = jnp.minimum(expert_s, len(b_ENK) - 1)
  scale_ENS = _spread(b_scale_Ens, b_ENK)
  arrays = a_SK, a_scale_SS, b_ENK, scale_ENS, expert_s, rows_s
  return tpu_gemm.rows_by_weights(*arrays, out_dtype, inside=grouped_matmul)


def masked_matmul(
  a_EMK: jax.Array,
  a_scale_EMS: jax.Array,
  b_ENK: jax.Array,
  b_scale_Ens: jax.Array,
  sizes_E: jax.Array,
  *,
  out_dtype: jnp.dtype,
) -> jax.Array:
  E, M, _ = a_EMK.shape
  missing = ((0, 0), (0, -M % tiles.TILE), (0, 0))
  a_EMK, a_scale_EMS = (jnp.pad(x, missing) for x in (a_EMK, a_scale_EMS))
  flat = lambda x_EMK: x_EMK.reshape(-1, x_EMK.shape[2])
  first_b = jnp.arange(a_EMK.shape[1] // tiles.TILE, dtype=jnp.int32) * tiles.TILE
  rows_Eb = jnp.clip(sizes_E[:, None] - first_b[None], 0, tiles.TILE)
  expert_s = jnp.repeat(jnp.arange(E, dtype=jnp.int32), len(first_b))
  out_SN = tpu_gemm.rows_by_weights(
    flat(a_EMK),
    flat(a_scale_EMS),
    b_ENK,
    _spread(b_scale_Ens, b_ENK),
    expert_s,
    rows_Eb.reshape(-1),
    out_dtype,
    inside=masked_matmul,
  )
  return out_SN.reshape(E, -1, out_SN.shape[1])[:, :M]


def _spread(scale_Ens: jax.Array, b_ENK: jax.Array) -> jax.Array:
  return jnp.repeat(scale_Ens, tiles.TILE, axis=1)[:, : b_ENK.shape[1]]
