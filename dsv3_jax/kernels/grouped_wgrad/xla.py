"""A loop over experts, and in it over blocks of columns, each dequantised and added up in float32."""

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax import compat
from dsv3_jax.kernels import tiles
from dsv3_jax.kernels.grouped_matmul.op import aligned_starts
from dsv3_jax.kernels.grouped_matmul.xla import Dot, plain_dot, walk
from dsv3_jax.kernels.quantize.xla import dequantize_tiles


def grouped_wgrad(
  a_MS: jax.Array,
  a_scale_Ms: jax.Array,
  b_NS: jax.Array,
  b_scale_Ns: jax.Array,
  group_sizes_E: jax.Array,
  *,
  accumulate: jax.Array | None,
  dot: Dot = plain_dot,
) -> jax.Array:
  """`dot`: for models of other arithmetic, whose sums over blocks are plain."""
  E, (M, S), N = len(group_sizes_E), a_MS.shape, b_NS.shape[0]
  like = [a_MS, a_scale_Ms, b_NS, b_scale_Ns, group_sizes_E]
  like += [] if accumulate is None else [accumulate]
  start_E = aligned_starts(group_sizes_E)

  def expert(e: jax.Array, out_EMN: jax.Array) -> jax.Array:
    def block(out_MN: jax.Array, slot: jax.Array, columns: int) -> jax.Array:
      def cut(x_XS: jax.Array, scale_Xs: jax.Array) -> jax.Array:
        tile, count = slot // tiles.TILE, columns // tiles.TILE
        of_block = lambda x: lax.dynamic_slice_in_dim(x, slot, columns, axis=1)
        codes_Xb = tiles.moved(of_block, x_XS)
        scale_Xb = lax.dynamic_slice_in_dim(scale_Xs, tile, count, axis=1)
        return dequantize_tiles(codes_Xb, scale_Xb, jnp.float32)

      return out_MN + dot(cut(a_MS, a_scale_Ms), cut(b_NS, b_scale_Ns))

    out_MN = lax.dynamic_index_in_dim(out_EMN, e, keepdims=False)
    out_MN = walk(S, start_E[e], group_sizes_E[e], block, out_MN)
    return lax.dynamic_update_index_in_dim(out_EMN, out_MN, e, 0)

  zeros = compat.zeros_like_varying((E, M, N), jnp.float32, *like)
  return lax.fori_loop(0, E, expert, zeros if accumulate is None else zeros + accumulate)
