"""Absorbed attention on Hopper: a block of 64 queries x heads walks the pages of its row, or a share of them.

A third warpgroup reads the table and loads page by page through TMA into a ring of two, which with the
queries is all of shared memory. Two warpgroups have the 64 rows each and half of the output's columns: both
multiply queries by keys, which at V3's sizes is a third of the products more than one alone would do, and
in return neither waits for the other. The softmax is in base 2 and FP32, and a page's output is added by the tensor
core to the accumulator in registers, shrunk before.

Where rows are too few for the card, their pages are split over blocks and the parts put together by their
lse. How many parts depends on shapes alone, where they start on the row alone: so do a row's bits.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.kernels import hopper
from dsv3_jax.kernels.mla_decode.entries import PAGE

if hopper.AVAILABLE:
  import jax.experimental.pallas as pl
  import jax.experimental.pallas.mosaic_gpu as plgpu

_ROWS, _STAGES = 64, 2
_SWIZZLED = 64  # columns of BF16, in 128 bytes
_MOST = 512  # of the latent: what two warpgroups can accumulate
_FAR = -1e30  # finite: exp(-inf - -inf) would be NaN


def supports(
  function: str,
  q_BLNX: jax.Array,
  pages_PMX: jax.Array,
  *rest: object,
  rank: int,
  **options: object,
) -> str | None:
  X = q_BLNX.shape[-1]
  for name, x in (('queries', q_BLNX), ('pages', pages_PMX)):
    if x.dtype != jnp.bfloat16:
      return f'{name} are {x.dtype}, the kernel reads bfloat16'
    if not x.size:
      return f'there is nothing in {x.shape}'
  if rank % (2 * _SWIZZLED) or X % _SWIZZLED or not rank <= _MOST:
    return (
      f'entries have {rank} + {X - rank} numbers, the kernel takes a multiple of {2 * _SWIZZLED} '
      f'up to {_MOST} and a multiple of {_SWIZZLED}'
    )
  return hopper.refusal()


def mla_decode(
  q_BLNX: jax.Array,
  pages_PMX: jax.Array,
  table_BJ: jax.Array,
  positions_BL: jax.Array,
  *,
  rank: int,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  (B, L, N, X), J = q_BLNX.shape, table_BJ.shape[1]
  q_BZX = hopper.padded(q_BLNX.reshape(B, L * N, X), _ROWS, 1)
  Z = q_BZX.shape[1]
  position_BZ = jnp.repeat(positions_BL, N, axis=1)
  position_BZ = jnp.pad(position_BZ, ((0, 0), (0, Z - L * N)), constant_values=-1)
  last_Bz = jnp.max(position_BZ.reshape(B, -1, _ROWS), axis=2)
  blocks, parts = B * Z // _ROWS, _parts(B * Z // _ROWS, J)
  half = rank // 2

  def body(*refs: Any, q_shared, ring, loaded, full, free):
    q, pages, table, position, last, out, lse = refs
    part, block = lax.axis_index('row'), lax.axis_index('column')
    row = pl.ds(block * _ROWS, _ROWS)
    end = last[block]
    count = lax.div(end + PAGE, PAGE)
    each = lax.div(count + (parts - 1), parts)
    first = part * each
    share = jnp.clip(count - first, 0, each)
    warpgroup = lax.axis_index('warpgroup')

    @pl.when(warpgroup == 2)
    def _load():
      plgpu.set_max_registers(40, action='decrease')
      plgpu.copy_gmem_to_smem(q.at[row], q_shared, loaded)
      entry = lax.div(block, Z // _ROWS) * J + first

      def load(i: jax.Array, page: jax.Array) -> jax.Array:
        following = table[
          entry + jnp.minimum(i + 1, share - 1)
        ]  # on its way while a slot gets free
        slot = lax.rem(i, _STAGES)

        @pl.when(i >= _STAGES)
        def _():
          plgpu.barrier_wait(free.at[slot])

        plgpu.copy_gmem_to_smem(pages.at[pl.ds(page * PAGE, PAGE)], ring.at[slot], full.at[slot])
        return following

      @pl.when(share > 0)
      def _():
        lax.fori_loop(0, share, load, table[entry])

      # What the last loads filled is waited for as well: a barrier must end where it began.
      rest = jnp.minimum(share, _STAGES)
      wait = lambda i, _: plgpu.barrier_wait(free.at[lax.rem(share - rest + i, _STAGES)])
      lax.fori_loop(0, rest, wait, None)

    @pl.when(warpgroup < 2)
    def _attend():
      plgpu.set_max_registers(232, action='increase')
      own = warpgroup * half
      position_R = plgpu.load(position.at[row], layout=hopper.ROW, optimized=False)
      plgpu.barrier_wait(loaded)

      def page(i: jax.Array, carry: Any) -> Any:
        out_RC, sum_R, max_R = carry
        slot = lax.rem(i, _STAGES)
        plgpu.barrier_wait(full.at[slot])

        def scores(acc: Any) -> jax.Array:
          plgpu.wgmma(acc, q_shared, ring.at[slot].T)
          return acc[...]

        score_RM = pl.run_scoped(scores, plgpu.ACC((_ROWS, PAGE), jnp.float32))
        entry_RM = plgpu.broadcasted_iota(jnp.int32, (_ROWS, PAGE), 1, layout=hopper.MATRIX)
        start = (first + i) * PAGE
        seen_RM = entry_RM + start <= hopper.rows(position_R, entry_RM.shape)
        score_RM = jnp.where(seen_RM, score_RM * (scale * math.log2(math.e)), _FAR)
        new_R = jnp.maximum(max_R, jnp.max(score_RM, axis=1))
        prob_RM = jnp.exp2(score_RM - hopper.rows(new_R, score_RM.shape))
        prob_RM = jnp.where(seen_RM, prob_RM, 0.0)
        shrink_R = jnp.exp2(max_R - new_R)
        sum_R = sum_R * shrink_R + jnp.sum(prob_RM, axis=1)

        # Zero times what stands behind the last entry must be zero, whoever wrote it before.
        @pl.when(start + PAGE > end + 1)
        def _():
          for c in range(half // _SWIZZLED):
            part_MC = ring.at[slot, :, pl.ds(own + c * _SWIZZLED, _SWIZZLED)]
            x_MC = plgpu.load(part_MC, layout=hopper.MATRIX)
            token = plgpu.broadcasted_iota(jnp.int32, x_MC.shape, 0, layout=hopper.MATRIX)
            part_MC[...] = jnp.where(token + start <= end, x_MC, jnp.zeros_like(x_MC))
          plgpu.commit_smem()

        out_RC = out_RC * hopper.rows(shrink_R, out_RC.shape)
        out_RC = hopper.add_product(
          out_RC, prob_RM.astype(jnp.bfloat16), ring.at[slot, :, pl.ds(own, half)]
        )
        plgpu.barrier_arrive(free.at[slot])
        return out_RC, sum_R, new_R

      zeros = plgpu.layout_cast(jnp.zeros((_ROWS, half), jnp.float32), hopper.MATRIX)
      row_of = lambda x: plgpu.layout_cast(jnp.full((_ROWS,), x, jnp.float32), hopper.ROW)
      out_RC, sum_R, max_R = lax.fori_loop(0, share, page, (zeros, row_of(0), row_of(_FAR)))
      inverse_R = jnp.where(sum_R > 0, 1 / sum_R, 0.0)
      out_RC = out_RC * hopper.rows(inverse_R, out_RC.shape)
      mine = out.at[part, row, pl.ds(own, half)]
      plgpu.store(mine, out_RC.astype(out.dtype), optimized=False)

      @pl.when(warpgroup == 0)
      def _():
        lse_R = jnp.where(sum_R > 0, max_R * math.log(2) + jnp.log(sum_R), -jnp.inf)
        plgpu.store(lse.at[part, row], lse_R, optimized=False)

  inputs = [
    q_BZX.reshape(-1, X),
    pages_PMX.reshape(-1, X),
    table_BJ.reshape(-1).astype(jnp.int32),
    position_BZ.reshape(-1),
    last_Bz.reshape(-1),
  ]
  dtype = q_BLNX.dtype if parts == 1 else jnp.float32
  outs = (
    jax.ShapeDtypeStruct((parts, B * Z, rank), dtype),
    jax.ShapeDtypeStruct((parts, B * Z), jnp.float32),
  )
  scratch = {
    'q_shared': hopper.swizzled((_ROWS, X), jnp.bfloat16, _SWIZZLED),
    'ring': hopper.swizzled((_STAGES, PAGE, X), jnp.bfloat16, _SWIZZLED),
    'loaded': plgpu.Barrier(),
    'full': plgpu.Barrier(num_barriers=_STAGES),
    'free': plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
  }
  run = hopper.kernel(
    body,
    outs,
    like=inputs,
    inside=mla_decode,
    scratch=scratch,
    grid=(parts, blocks),
    warpgroups=3,
  )
  out_pRC, lse_pR = run(*inputs)
  lse_R = lse_pR[0] if parts == 1 else jax.nn.logsumexp(lse_pR, axis=0)
  if parts > 1:
    weight_pR = jnp.exp(lse_pR - jnp.where(lse_R == -jnp.inf, 0, lse_R)[None])
    out_pRC = jnp.einsum('pR,pRC->RC', weight_pR, out_pRC).astype(q_BLNX.dtype)[None]
  out_BZC = out_pRC[0].reshape(B, Z, rank)[:, : L * N]
  lse_BZ = lse_R.reshape(B, Z)[:, : L * N]
  return out_BZC.reshape(B, L, N, rank), lse_BZ.reshape(B, L, N)


def _parts(blocks: int, pages: int) -> int:
  """Of a row's pages: as many as fill the card with one block each, and at least 4 pages in a part."""
  return max(1, min(hopper.blocks() // blocks, pages // 4))
