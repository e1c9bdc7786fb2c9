"""What `bench.py` times: DeepSeek-V3's shapes, by which DeepGEMM and FlashMLA are measured, and what stands beside each.

Arrays are made when a case is run; `jax.eval_shape` of `make` is enough to compile it, which a test does.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.kernels.fp8_matmul import fp8_matmul
from dsv3_jax.kernels.fp8_wgrad import fp8_wgrad
from dsv3_jax.kernels.grouped_matmul import grouped_matmul, masked_matmul
from dsv3_jax.kernels.grouped_wgrad import grouped_wgrad
from dsv3_jax.kernels.mla_decode import PAGE, mla_decode
from dsv3_jax.kernels.quantize import (
  quantize_blocks,
  quantize_tiles,
  quantize_tiles_transposed,
  requantize_transposed,
)
from dsv3_jax.kernels.swiglu_quantize import swiglu_quantize

NK = [(2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)]
RANK, ROPE = 512, 64
_BF16 = jnp.bfloat16
Arrays = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Case:
  """One shape of one operation. `moved`: bytes; `peers`: another way to the same, and its arrays."""

  op: str
  function: Callable[..., Any]
  make: Callable[[], Arrays]
  shape: dict[str, int]
  flops: int = 0
  moved: int = 0
  peers: dict[str, tuple[Callable[..., Any], Callable[[], Arrays]]] = dataclasses.field(
    default_factory=dict
  )


def cases(quick: bool) -> Iterator[Case]:
  """All of them; `quick`: one of each operation, tiny."""
  if quick:
    yield _dense(128, 128, 128)
    yield _grouped(2, 128, 128, 256)
    yield _masked(2, 128, 128, 256)
    yield from _wgrads(256, 128, 128)
    yield from _by_element(128, 256)
    yield _attention(2, 2, 32, 128)
    return
  for M in (64, 128, 4096):
    for N, K in NK:
      yield _dense(M, N, K)
  for E, M in ((4, 8192), (8, 4096)):
    yield _grouped(E, M, 4096, 7168)
    yield _grouped(E, M, 7168, 2048)
  for E, M in ((1, 1024), (2, 512), (4, 256)):
    yield _masked(E, M, 4096, 7168)
    yield _masked(E, M, 7168, 2048)
  yield from _wgrads(4096, 4096, 7168)
  yield from _wgrads(4096, 7168, 2048)
  yield from _by_element(4096, 7168)
  for rows, queries, heads, context in (
    (128, 1, 128, 4096),  # a GPU of the report's decode: all heads
    (128, 2, 128, 4096),  # with a draft to verify
    (128, 1, 16, 4096),  # heads over 8 GPUs
    (4, 1, 128, 32768),  # few rows: their pages are split
  ):
    yield _attention(rows, queries, heads, context)


def product(x_MK: jax.Array, y_NK: jax.Array) -> jax.Array:
  """XLA's own, of what it is given -> BF16."""
  out = jnp.einsum('MK,NK->MN', x_MK, y_NK, preferred_element_type=jnp.float32)
  return out.astype(_BF16)


def normal(*shape: int, seed: int = 0, dtype: Any = jnp.float32) -> jax.Array:
  return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def _dense(M: int, N: int, K: int) -> Case:
  def make() -> Arrays:
    return (*quantize_tiles(normal(M, K)), *quantize_blocks(normal(N, K, seed=1)))

  half = lambda: (normal(M, K, dtype=_BF16), normal(N, K, seed=1, dtype=_BF16))
  shape = {'M': M, 'N': N, 'K': K}
  moved = M * K + N * K + 2 * M * N
  return Case(
    'fp8_matmul', fp8_matmul, make, shape, 2 * M * N * K, moved, {'bf16': (product, half)}
  )


def _grouped(E: int, M: int, N: int, K: int) -> Case:
  def make() -> Arrays:
    a, b = quantize_tiles(normal(E * M, K)), quantize_blocks(normal(E, N, K, seed=1))
    return (*a, *b, jnp.full((E,), M, jnp.int32))

  def loop(a: jax.Array, a_scale: jax.Array, b: jax.Array, b_scale: jax.Array, _: jax.Array) -> Any:
    part = lambda x, e: x[e * M : (e + 1) * M]
    return [fp8_matmul(part(a, e), part(a_scale, e), b[e], b_scale[e]) for e in range(E)]

  shape = {'E': E, 'M': M, 'N': N, 'K': K}
  moved = E * (M * K + N * K + 2 * M * N)
  return Case(
    'grouped_matmul', grouped_matmul, make, shape, 2 * E * M * N * K, moved, {'loop': (loop, make)}
  )


def _masked(E: int, M: int, N: int, K: int) -> Case:
  def make() -> Arrays:
    a = [x.reshape(E, M, -1) for x in quantize_tiles(normal(E * M, K))]
    return (*a, *quantize_blocks(normal(E, N, K, seed=1)), jnp.full((E,), M, jnp.int32))

  moved = E * (M * K + N * K + 2 * M * N)
  shape = {'E': E, 'M': M, 'N': N, 'K': K}
  return Case('masked_matmul', masked_matmul, make, shape, 2 * E * M * N * K, moved)


def _wgrads(T: int, M: int, N: int) -> Iterator[Case]:
  def make() -> Arrays:
    return (*quantize_tiles(normal(M, T)), *quantize_tiles(normal(N, T, seed=1)))

  shape, moved = {'M': M, 'N': N, 'K': T}, (M + N) * T + 4 * M * N
  yield Case('fp8_wgrad', fp8_wgrad, make, shape, 2 * M * N * T, moved)
  of_two = lambda: (*make(), jnp.full((2,), T // 2, jnp.int32))
  moved += 4 * M * N
  yield Case('grouped_wgrad', grouped_wgrad, of_two, {'E': 2} | shape, 2 * M * N * T, moved)


def _by_element(M: int, K: int) -> Iterator[Case]:
  x, shape = lambda: (normal(M, K, dtype=_BF16),), {'M': M, 'K': K}
  for op in (quantize_tiles, quantize_tiles_transposed, quantize_blocks):
    yield Case(op.__name__, op, x, shape, moved=3 * M * K)
  codes = lambda: quantize_tiles(*x())
  yield Case('requantize_transposed', requantize_transposed, codes, shape, moved=2 * M * K)
  yield Case('swiglu_quantize', swiglu_quantize, lambda: x() * 2, shape, moved=5 * M * K)


def _attention(rows: int, queries: int, heads: int, context: int) -> Case:
  pages = context // PAGE
  run = functools.partial(mla_decode, rank=RANK, scale=0.1)

  def make() -> Arrays:
    q = normal(rows, queries, heads, RANK + ROPE, dtype=_BF16)
    cache = normal(rows * pages, PAGE, RANK + ROPE, seed=1, dtype=_BF16)
    table = np.random.default_rng(0).permutation(rows * pages).astype(np.int32)
    positions = jnp.arange(context - queries, context, dtype=jnp.int32)
    positions = jnp.broadcast_to(positions[None], (rows, queries))
    return q, cache, jnp.asarray(table).reshape(rows, pages), positions

  seen = rows * context
  return Case(
    'mla_decode',
    run,
    make,
    {'rows': rows, 'queries': queries, 'heads': heads, 'context': context},
    flops=2 * seen * queries * heads * (2 * RANK + ROPE),
    moved=2 * (seen * (RANK + ROPE) + rows * queries * heads * (2 * RANK + ROPE)),
    peers={'xla': (functools.partial(run, implementation='xla'), make)},
  )
