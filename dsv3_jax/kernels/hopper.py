"""What every Mosaic GPU kernel asks of JAX and of the card; versions of JAX differ here and nowhere else.

The kernels are for Hopper (sm_90a), written in Pallas for warpgroups: 128 threads that hold an array in
registers together. They need jax 0.11: 0.10 has another form of these calls and an interpreter that
cannot load what FP8 needs. Without a GPU they run in JAX's interpreter, in NumPy and slowly:

  with hopper.interpreted():
    fp8_matmul(..., implementation='mosaic_gpu')

and `pods.py` compiles them for cards that are not there. The interpreter takes layouts that no card does.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax import compat

_KINDS = ('H100', 'H200', 'H800', 'H20', 'GH200')  # compute capability 9.0
AXES = 'row', 'column'
_SMS = 132  # of a full H100 or H200
AVAILABLE = tuple(map(int, jax.__version__.split('.')[:2])) >= (0, 11)
_interpreted = contextvars.ContextVar('interpreted', default=False)

if AVAILABLE:
  import jax.experimental.pallas as pl
  import jax.experimental.pallas.mosaic_gpu as plgpu

  MATRIX = plgpu.Layout.WGMMA  # how a warpgroup holds a matrix, and a vector of its rows or columns
  ROW, COLUMN = MATRIX.reduce(1), MATRIX.reduce(0)


def refusal() -> str | None:
  """Why no kernel can run or be compiled here; None where it can."""
  if not AVAILABLE:
    return f'Mosaic GPU kernels need jax 0.11 or newer (Python 3.12), this is {jax.__version__}'
  if _interpreted.get():
    return None
  kind = _device()[0]
  return None if any(k in kind for k in _KINDS) else f'{kind} is no Hopper GPU'


@contextlib.contextmanager
def interpreted(**options: Any) -> Iterator[None]:
  """Kernels inside run in the interpreter on the CPU; `options` of plgpu.InterpretGPUParams.

  What is read before it was written is NaN, and a read beyond an array raises.
  """
  token = _interpreted.set(True)
  try:
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(**options)):
      yield
  finally:
    _interpreted.reset(token)


def kernel(
  body: Callable[..., None],
  out: Any,
  *,
  like: Sequence[jax.Array],
  inside: Callable[..., Any],
  scratch: Sequence[Any] | dict[str, Any] = (),
  grid: Sequence[int] | None = None,
  warpgroups: int = 1,
) -> Callable[..., Any]:
  """A kernel of `grid` blocks (axes AXES) of so many warpgroups (axis 'warpgroup').

  Without a `grid` it is persistent: one block (axis 'block') on each streaming multiprocessor.
  `out`: a ShapeDtypeStruct or a tuple of them; inside a manual shard_map they vary as the arrays `like`.
  Profiles and compiled programs call it by the operation `inside` of which a function was defined.
  """
  body.__name__ = inside.__qualname__.partition('.')[0]
  # plgpu.kernel drops mesh axes from the types of its results, up to jax 0.12, so they get them behind it.
  run = plgpu.kernel(
    body,
    out_type=out,
    scratch_types=scratch,
    grid=(blocks(),) if grid is None else tuple(grid),
    grid_names=('block',) if grid is None else AXES[: len(grid)],
    num_threads=warpgroups,
    thread_name='warpgroup',
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
    ),
  )
  return lambda *operands: compat.vary_like(run(*operands), *like)


def blocks() -> int:
  """Streaming multiprocessors; the interpreter has a thread for each, two show what there is to see."""
  return 2 if _interpreted.get() else _device()[1]


def kind() -> str:
  """The name of the card, as tables of measurements are kept by; 'NVIDIA H200'."""
  return _device()[0]


def swizzled(shape: Sequence[int], dtype: Any, minor: int | None = None) -> Any:
  """Shared memory in the layout of TMA and of tensor cores: 8 rows of `minor` elements, of 128 bytes at most.

  A slice starts and ends at a multiple of `minor`, which is as much as there may be without saying.
  """
  size = jnp.dtype(dtype).itemsize
  swizzle = plgpu.find_swizzle((minor or shape[-1]) * size * 8)
  transforms = (plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle))
  return plgpu.SMEM(tuple(shape), dtype, transforms=transforms)


def own_share(total: Any, body: Callable[[jax.Array, Any], Any], init: Any) -> Any:
  """body(i, carry) for every grid-th i below `total` from this block's own number on."""
  grid = lax.axis_size('block')
  first = lax.axis_index('block')
  count = lax.div(total - first + (grid - 1), jnp.int32(grid))
  return lax.fori_loop(0, count, lambda i, carry: body(first + i * grid, carry), init)


def add_product(sum_MN: jax.Array, a_MK: jax.Array, b_KN: Any) -> jax.Array:
  """sum + a b in the tensor core's accumulator; `a_MK` in registers, `b_KN` in shared memory.

  The interpreter has neither accumulators with a start nor operands in registers, and is given the sum.
  """
  if _interpreted.get():
    b_KN = plgpu.load(b_KN)
    return sum_MN + jnp.dot(a_MK, b_KN, preferred_element_type=jnp.float32)
  return pl.run_state(lambda acc: plgpu.wgmma(acc, a_MK, b_KN))(plgpu.ACC.init(sum_MN))


def rows(x_M: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """[M] -> [M, N], the same along a row."""
  return lax.broadcast_in_dim(x_M, shape, (0,))


def columns(x_N: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """[N] -> [M, N], the same along a column."""
  return lax.broadcast_in_dim(x_N, shape, (1,))


def padded(x: jax.Array, *multiples: int) -> jax.Array:
  """Zeros up to multiples along the last axes; the same array where it needs none."""
  missing = [-size % m for size, m in zip(x.shape[-len(multiples) :], multiples, strict=True)]
  if not any(missing):
    return x
  return jnp.pad(x, [(0, 0)] * (x.ndim - len(missing)) + [(0, n) for n in missing])


def _device() -> tuple[str, int]:
  """(kind, streaming multiprocessors) of what is compiled for."""
  abstract = getattr(jax.sharding.get_abstract_mesh(), 'abstract_device', None)
  if abstract is not None:
    return abstract.device_kind, abstract.num_cores or _SMS
  device = jax.devices()[0]
  return device.device_kind, getattr(device, 'core_count', None) or _SMS
