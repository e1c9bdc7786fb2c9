"""Absorbed attention on TPU: blocks of queries x heads walk the pages of their row, eight at a time.

The table lies in SMEM. While a chunk of pages is multiplied, the next is copied page by page into the other
of two buffers; the loop ends behind the block's last position, so that time follows the length of each row
and pages behind it are never read. The softmax runs over chunks in FP32.

Bytes of an FP8 entry that make one number lie in neighbouring lanes, which nothing on the chip brings
together but the matrix unit: a product with a matrix of ones and zeros, exact for bytes, takes them apart.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsv3_jax.kernels import tiles, tpu
from dsv3_jax.kernels.mla_decode.entries import PAGE
from dsv3_jax.kernels.quantize import xla as quantize

_ROWS = 256  # of queries x heads in a block
_PAGES = 8  # of a chunk
_FAR = -1e30  # finite: exp(-inf - -inf) would be NaN


def supports(
  function: str,
  q_BLNX: jax.Array,
  pages_PMX: jax.Array,
  *rest: object,
  rank: int,
  **options: object,
) -> str | None:
  if q_BLNX.dtype not in (jnp.bfloat16, jnp.float32):
    return f'queries are {q_BLNX.dtype}, the kernel reads bfloat16 and float32'
  if pages_PMX.dtype not in (q_BLNX.dtype, jnp.uint8):
    return (
      f'pages are {pages_PMX.dtype}, queries {q_BLNX.dtype}: the kernel reads both alike, or FP8'
    )
  if pages_PMX.dtype == jnp.uint8 and rank % tiles.TILE:
    return f'FP8 latents of {rank} numbers: the kernel takes multiples of {tiles.TILE}'
  return tpu.supports(function)


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
  Z, pages = L * N, min(_PAGES, J)
  rows = min(_ROWS, Z)
  blocks = pl.cdiv(Z, rows)
  position_BZ = jnp.repeat(positions_BL, N, axis=1)
  missing = ((0, 0), (0, blocks * rows - Z))
  last_Bz = jnp.pad(position_BZ, missing, constant_values=-1).reshape(B, blocks, rows).max(axis=2)
  row_spec = lambda size: pl.BlockSpec((None, rows, size), lambda b, z, last: (b, z, 0))
  lane_spec = pl.BlockSpec((None, 1, rows), lambda b, z, last: (b, 0, z))
  table_spec = pl.BlockSpec(
    (None, 1, J), lambda b, z, last: (b, 0, 0), memory_space=pltpu.MemorySpace.SMEM
  )
  out_BZC, lse_B1Z = tpu.call(
    functools.partial(_kernel, rank=rank, scale=scale),
    (B, blocks),
    [
      last_Bz,
      table_BJ.astype(jnp.int32)[:, None],
      position_BZ[:, None],
      q_BLNX.reshape(B, Z, X),
      pages_PMX,
    ],
    [table_spec, lane_spec, row_spec(X), pl.BlockSpec(memory_space=pl.ANY)],
    [((B, Z, rank), q_BLNX.dtype), ((B, 1, Z), jnp.float32)],
    [row_spec(rank), lane_spec],
    flops=2 * B * Z * J * PAGE * (X + rank),
    moved=2 * q_BLNX.nbytes + B * blocks * J * pages_PMX[0].nbytes,
    order='pp',
    inside=mla_decode,
    prefetch=1,
    scratch=[
      pltpu.VMEM((2, pages, *pages_PMX.shape[1:]), pages_PMX.dtype),
      pltpu.VMEM((rows, rank), jnp.float32),
      pltpu.VMEM((rows, 1), jnp.float32),
      pltpu.VMEM((rows, 1), jnp.float32),
      pltpu.SemaphoreType.DMA((2,)),
    ],
  )
  return out_BZC.reshape(B, L, N, rank), lse_B1Z.reshape(B, L, N)


def _kernel(
  last_ref,
  table_ref,
  position_ref,
  q_ref,
  pages_ref,
  out_ref,
  lse_ref,
  chunk_ref,
  acc_ref,
  sum_ref,
  max_ref,
  arrived,
  *,
  rank,
  scale,
):
  last = last_ref[pl.program_id(0), pl.program_id(1)]
  _, pages, _, size = chunk_ref.shape
  count = lax.div(last + PAGE, PAGE)
  chunks = lax.div(count + (pages - 1), pages)
  acc_ref[...] = jnp.zeros_like(acc_ref)
  sum_ref[...] = jnp.zeros_like(sum_ref)
  max_ref[...] = jnp.full_like(max_ref, _FAR)
  position_R1 = position_ref[...].T
  exact = lax.Precision.HIGHEST if q_ref.dtype == jnp.float32 else None

  def each_page(i: jax.Array, do) -> None:
    def page(g: jax.Array, _: None) -> None:
      source = pages_ref.at[table_ref[0, i * pages + g]]
      slot = lax.rem(i, 2)
      do(pltpu.make_async_copy(source, chunk_ref.at[slot, g], arrived.at[slot]))

    lax.fori_loop(0, jnp.minimum(pages, count - i * pages), page, None)

  start = lambda copy: copy.start()
  wait = lambda copy: copy.wait()

  @pl.when(chunks > 0)
  def _():
    each_page(0, start)

  def chunk(i: jax.Array, _: None) -> None:
    @pl.when(i + 1 < chunks)
    def _():
      each_page(i + 1, start)

    each_page(i, wait)
    entries = chunk_ref.at[lax.rem(i, 2)]
    first = i * (pages * PAGE)

    # Zero times what stands behind the last entry must be zero, whoever wrote it before.
    @pl.when(i + 1 == chunks)
    def _():
      shape = pages, PAGE, size
      entry = lax.broadcasted_iota(jnp.int32, shape, 0) * PAGE
      entry += lax.broadcasted_iota(jnp.int32, shape, 1) + first
      entries[...] = jnp.where(entry <= last, entries[...], jnp.zeros(shape, entries.dtype))

    key_MX = _numbers(entries[...].reshape(pages * PAGE, size), rank, q_ref.dtype)
    score_RM = _dot(q_ref[...], key_MX, (1, 1), exact) * scale
    entry_RM = lax.broadcasted_iota(jnp.int32, score_RM.shape, 1) + first
    seen_RM = entry_RM <= position_R1
    score_RM = jnp.where(seen_RM, score_RM, _FAR)
    new_R1 = jnp.maximum(max_ref[...], jnp.max(score_RM, axis=1, keepdims=True))
    prob_RM = jnp.where(seen_RM, jnp.exp(score_RM - new_R1), 0)
    shrink_R1 = jnp.exp(max_ref[...] - new_R1)
    sum_ref[...] = sum_ref[...] * shrink_R1 + jnp.sum(prob_RM, axis=1, keepdims=True)
    part_RC = _dot(prob_RM.astype(key_MX.dtype), key_MX[:, :rank], (1, 0), exact)
    acc_ref[...] = acc_ref[...] * shrink_R1 + part_RC
    max_ref[...] = new_R1

  lax.fori_loop(0, chunks, chunk, None)
  sum_R1 = sum_ref[...]
  seen_R1 = sum_R1 > 0
  out_ref[...] = (acc_ref[...] / jnp.where(seen_R1, sum_R1, 1)).astype(out_ref.dtype)
  lse_R1 = jnp.where(seen_R1, max_ref[...] + jnp.log(sum_R1), -jnp.inf)
  lse_ref[...] = lse_R1.T


def _numbers(entry_MY: jax.Array, rank: int, dtype: jnp.dtype) -> jax.Array:
  """As `entries.unpack`."""
  if entry_MY.dtype != jnp.uint8:
    return entry_MY
  S = rank // tiles.TILE
  R = (entry_MY.shape[1] - rank - 4 * S) // 2
  byte_MY = entry_MY[:, rank:].astype(jnp.int32).astype(jnp.float32).astype(jnp.bfloat16)

  def byte(k: int) -> jax.Array:
    """The k-th of every number, int32 [M, R + S]; of those of the key there are two."""
    source, number = (
      lax.broadcasted_iota(jnp.int32, (byte_MY.shape[1], R + S), axis) for axis in (0, 1)
    )
    place = jnp.where(number < R, 4 * S + 2 * number, 4 * (number - R)) + k
    chosen = (source == place).astype(jnp.float32).astype(jnp.bfloat16)
    return _dot(byte_MY, chosen, (1, 0), None).astype(jnp.int32)

  half_MZ = byte(0) | (byte(1) << 8)
  upper_MS = (byte(2) | (byte(3) << 8))[:, R:]
  k_rope_MR = tiles.number(half_MZ[:, :R] << 16)
  scale_MS = tiles.number(half_MZ[:, R:] | (upper_MS << 16))
  codes_MC = lax.bitcast_convert_type(entry_MY[:, :rank], jnp.float8_e4m3fn)
  parts = [
    quantize.values(codes_MC[:, at]) * scale_MS[:, t : t + 1]
    for t, at in enumerate(tpu.lanes(rank))
  ]
  return jnp.concatenate([*parts, k_rope_MR], axis=1).astype(dtype)


def _dot(a, b, axes: tuple[int, int], precision: lax.Precision | None) -> jax.Array:
  contract = ((axes[0],), (axes[1],)), ((), ())
  return lax.dot_general(a, b, contract, precision=precision, preferred_element_type=jnp.float32)
