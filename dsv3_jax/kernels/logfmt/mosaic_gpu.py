"""LogFMT on Hopper: what a tile has for itself once per row, the rest of `xla.py` per element."""

from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.kernels import hopper, tiles
from dsv3_jax.kernels import hopper_tiles as ht
from dsv3_jax.kernels.logfmt import xla

_F32 = jnp.float32


def supports(function: str, x: jax.Array, *rest: object, **options: object) -> str | None:
  return ht.refusal(x)


def encode(x_XD: jax.Array, bits: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  *lead, dim = x_XD.shape
  x_MD = ht.flat(x_XD)

  def body(x: Any, codes: Any, low: Any, high: Any) -> None:
    x_RH = ht.load(x)
    magnitude_RH = tiles.magnitude_bits(x_RH)
    smallest_R = -jnp.max(-xla.nonzero(magnitude_RH), axis=1)
    low_R, high_R = xla.bounds(jnp.max(magnitude_RH, axis=1), smallest_R)
    of_tile = (hopper.rows(each, x_RH.shape) for each in xla.of_tile(low_R, high_R, bits))
    codes[...] = xla.code(x_RH, *of_tile, bits).astype(jnp.uint16)
    low[...], high[...] = low_R, high_R

  M, S = x_MD.shape[0], x_MD.shape[1] // ht.TILE
  outs = [
    (jax.ShapeDtypeStruct(x_MD.shape, jnp.uint16), ht.MATRIX),
    *[(jax.ShapeDtypeStruct((S, M), _F32), ht.PER_TILE)] * 2,
  ]
  codes_MD, *ends = ht.run(body, (M // ht.ROWS, S), [(x_MD, ht.MATRIX)], outs)
  as_bf16 = lambda x_SM: ht.unflat(x_SM.T.astype(jnp.bfloat16), lead, tiles.count(dim))  # exact
  return ht.unflat(codes_MD, lead, dim), *map(as_bf16, ends)


def decode(
  codes_XD: jax.Array, low_XS: jax.Array, high_XS: jax.Array, bits: int, dtype: jnp.dtype
) -> jax.Array:
  *lead, dim = codes_XD.shape
  codes_MD = ht.flat(codes_XD)
  M, S = codes_MD.shape[0], codes_MD.shape[1] // ht.TILE
  per_tile = lambda x_XS: hopper.padded(x_XS.astype(_F32).reshape(-1, S).T, ht.ROWS)

  def body(codes: Any, low: Any, high: Any, out: Any) -> None:
    low_R, high_R = (ht.load(each, hopper.ROW) for each in (low, high))
    codes_RH = ht.load(codes)
    low_RH, log_RH = (
      hopper.rows(each, codes_RH.shape) for each in (low_R, xla.log_ratio(low_R, high_R, bits))
    )
    out[...] = xla.value(codes_RH, low_RH, log_RH, bits).astype(dtype)

  ins = [(codes_MD, ht.MATRIX), *[(per_tile(x), ht.PER_TILE) for x in (low_XS, high_XS)]]
  (out_MD,) = ht.run(
    body, (M // ht.ROWS, S), ins, [(jax.ShapeDtypeStruct(codes_MD.shape, dtype), ht.MATRIX)]
  )
  return ht.unflat(out_MD, lead, dim)
