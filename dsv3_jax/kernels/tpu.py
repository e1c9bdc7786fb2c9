"""What the Pallas kernels for TPU share: the call, blocks of rows, what they refuse.

On a CPU the same kernels run interpreted, exactly and slowly, for tests. Blocks may run over an array's
edge: what is read there is anything, NaN included, and what is written there is dropped. So rows that lie
outside need no mask as long as nothing is summed over them.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsv3_jax import compat
from dsv3_jax.kernels import choice, tiles

# Of 64 MiB on v5p and tpu7x (and 128 on v6e); the rest is the compiler's.
VMEM = 48 << 20


def supports(function: str, *arguments: Any, **options: Any) -> str | None:
  """The reason why no kernel for TPU can run here, or None."""
  platform = choice.platform()
  if platform not in ('tpu', 'cpu'):
    return f'it is for TPUs (and interpreted on CPUs), not for {platform}'
  return None


def too_wide(dim: int, bytes_per_number: int, rows: int) -> str | None:
  """Why blocks of whole rows do not fit in VMEM, or None. Blocks are there twice: one is on its way."""
  most = VMEM // (2 * rows * bytes_per_number)
  return f'rows have {dim} numbers: at most {most} fit in VMEM' if dim > most else None


def rows_of(count: int, row_bytes: int) -> int:
  """Rows of a block: 32 to 512, about 4 MiB, no more than there are."""
  rows = 512
  while rows > 32 and rows * row_bytes > 4 << 20:
    rows //= 2
  return min(rows, round_up(count, 32))


def round_up(n: int, multiple: int) -> int:
  return -(-n // multiple) * multiple


def lanes(dim: int) -> list[slice]:
  """The tiles of 1x128 of a block's last axis, the last one ragged."""
  return [slice(i, min(i + tiles.TILE, dim)) for i in range(0, dim, tiles.TILE)]


def by_rows(
  kernel: Callable[..., None],
  operands: Sequence[jax.Array],
  outputs: Sequence[tuple[int, jnp.dtype]],
  *,
  inside: Callable[..., Any],
) -> list[jax.Array]:
  """`kernel` on blocks of whole rows of matrices; `outputs`: their columns and types; `inside`: see `call`."""
  M = len(operands[0])
  rows = rows_of(M, 4 * max(x.shape[1] for x in operands))
  spec = lambda columns: pl.BlockSpec((rows, columns), lambda m: (m, 0))
  return call(
    kernel,
    (pl.cdiv(M, rows),),
    operands,
    [spec(x.shape[1]) for x in operands],
    [((M, columns), dtype) for columns, dtype in outputs],
    [spec(columns) for columns, _ in outputs],
    flops=2 * operands[0].size,
    order='p',
    inside=inside,
  )


def call(
  kernel: Callable[..., None],
  grid: tuple[int, ...],
  operands: Sequence[jax.Array],
  in_specs: Sequence[pl.BlockSpec],
  outputs: Sequence[tuple[tuple[int, ...], jnp.dtype]],
  out_specs: Sequence[pl.BlockSpec],
  *,
  flops: int,
  order: str,
  inside: Callable[..., Any],
  moved: int | None = None,
  prefetch: int = 0,
  scratch: Sequence[Any] = (),
  aliases: dict[int, int] | None = None,
) -> list[jax.Array]:
  """`pl.pallas_call` under a manual shard_map as well: outputs vary over the mesh wherever operands do.

  `order`: a letter per axis of the grid, 'p' for any order, 'a' for one after another. `prefetch`: so many
  of the operands are integers that the index maps read. `aliases`: operand -> output in its place. `moved`:
  bytes, where it is not all of the operands and outputs once. Profiles and compiled programs call the kernel by
  the operation `inside` of which it runs.
  """
  operands = compat.vary_like(tuple(operands), *operands)
  varying = jax.typeof(operands[0]).manual_axis_type
  shapes = [jax.ShapeDtypeStruct(s, dtype, manual_axis_type=varying) for s, dtype in outputs]
  size = lambda x: math.prod(x.shape) * jnp.dtype(x.dtype).itemsize
  moved = moved or sum(map(size, operands)) + sum(map(size, shapes))
  compiled = choice.platform() == 'tpu'
  return pl.pallas_call(
    kernel,
    out_shape=shapes,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=prefetch,
      grid=grid,
      in_specs=list(in_specs),
      out_specs=list(out_specs),
      scratch_shapes=list(scratch),
    ),
    # The interpreter pads an output to whole blocks, one in an operand's place included, and fails.
    input_output_aliases=aliases if compiled and aliases else {},
    cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=[{'p': 'parallel', 'a': 'arbitrary'}[letter] for letter in order],
      vmem_limit_bytes=VMEM,
    ),
    interpret=False if compiled else pltpu.InterpretParams(),
    name=inside.__name__,
  )(*operands)
