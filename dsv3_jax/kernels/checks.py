"""What operations on FP8 codes ask of their arguments; a ValueError says what is wrong and what is right."""

import jax
import jax.numpy as jnp

from dsv3_jax.kernels import tiles

CODES = (jnp.float8_e4m3fn, jnp.float8_e5m2)


def numbers(what: str, x: jax.Array, ndim: int | None = None) -> None:
  """bfloat16 or float32 of so many dimensions."""
  if x.dtype not in (jnp.bfloat16, jnp.float32):
    raise ValueError(f'{what} of {x.dtype}: must be bfloat16 or float32')
  if ndim is not None and x.ndim != ndim:
    raise ValueError(f'{what} {x.shape}: must have {ndim} dimensions')


def codes(name: str, x: jax.Array, ndim: int) -> None:
  if x.dtype not in CODES:
    raise ValueError(f'{name} of {x.dtype}: must be float8_e4m3fn (or float8_e5m2)')
  if x.ndim != ndim:
    raise ValueError(f'{name} {x.shape}: must have {ndim} dimensions')


def tile_scale(name: str, scale: jax.Array, codes: jax.Array) -> None:
  """One scale per 1x128 of the codes."""
  _scale(name, scale, codes, (*codes.shape[:-1], tiles.count(codes.shape[-1])), '1x128')


def block_scale(name: str, scale: jax.Array, codes: jax.Array) -> None:
  """One scale per 128x128 of the last two dimensions of the codes."""
  *lead, rows, columns = codes.shape
  need = (*lead, tiles.count(rows), tiles.count(columns))
  _scale(name, scale, codes, need, '128x128')


def _scale(name: str, scale: jax.Array, codes: jax.Array, need: tuple[int, ...], per: str) -> None:
  if scale.shape != need or scale.dtype != jnp.float32:
    raise ValueError(
      f'{name} {scale.dtype}{list(scale.shape)} of codes {codes.shape}: '
      f'must be float32{list(need)}, one per {per}'
    )


def same(what: str, a: int, b: int, names: str) -> None:
  if a != b:
    raise ValueError(f'{what}: {names} have {a} and {b}: must be equal')


def aligned(name: str, size: int) -> None:
  """Groups of rows start at multiples of 128."""
  if size % tiles.TILE:
    raise ValueError(f'{name} = {size}: must be a multiple of {tiles.TILE}, where groups may start')


def sizes(name: str, x: jax.Array, groups: int) -> None:
  if x.shape != (groups,) or x.dtype != jnp.int32:
    raise ValueError(f'{name} {x.dtype}{list(x.shape)}: must be int32[{groups}], one per group')


def output(dtype: jnp.dtype) -> None:
  if dtype not in (jnp.bfloat16, jnp.float32):
    raise ValueError(f'out_dtype = {jnp.dtype(dtype).name}: must be bfloat16 or float32')


def accumulator(x: jax.Array | None, need: tuple[int, ...]) -> None:
  if x is not None and (x.shape != need or x.dtype != jnp.float32):
    raise ValueError(f'accumulate {x.dtype}{list(x.shape)}: must be float32{list(need)}')
