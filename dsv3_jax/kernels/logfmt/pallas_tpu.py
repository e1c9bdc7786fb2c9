"""On TPU: `xla.py` tile by tile in VMEM."""

import functools

import jax
import jax.numpy as jnp

from dsv3_jax.kernels import tiles, tpu
from dsv3_jax.kernels.logfmt import xla


def supports(function: str, x: jax.Array, *arguments: object) -> str | None:
  return tpu.too_wide(x.shape[-1], 6, 32) or tpu.supports(function)


def encode(x_XD: jax.Array, bits: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  *lead, D = x_XD.shape
  S = tiles.count(D)
  kernel = functools.partial(_encode_kernel, bits=bits)
  outputs = (D, jnp.uint16), (S, jnp.float32), (S, jnp.float32)
  codes_MD, low_MS, high_MS = tpu.by_rows(kernel, [x_XD.reshape(-1, D)], outputs, inside=encode)
  as_bf16 = lambda x_MS: x_MS.astype(jnp.bfloat16).reshape(*lead, S)  # exact
  return codes_MD.reshape(*lead, D), as_bf16(low_MS), as_bf16(high_MS)


def decode(
  codes_XD: jax.Array, low_XS: jax.Array, high_XS: jax.Array, bits: int, dtype: jnp.dtype
) -> jax.Array:
  flat = lambda x: x.reshape(-1, x.shape[-1])
  operands = [flat(codes_XD), *(flat(x).astype(jnp.float32) for x in (low_XS, high_XS))]
  kernel = functools.partial(_decode_kernel, bits=bits)
  (x_MD,) = tpu.by_rows(kernel, operands, [(codes_XD.shape[-1], dtype)], inside=decode)
  return x_MD.reshape(codes_XD.shape)


def _encode_kernel(x_ref, codes_ref, low_ref, high_ref, *, bits):
  for t, at in enumerate(tpu.lanes(x_ref.shape[1])):
    x_MH = x_ref[:, at].astype(jnp.float32)
    magnitude_MH = tiles.magnitude_bits(x_MH)
    largest_M1 = jnp.max(magnitude_MH, axis=1, keepdims=True)
    smallest_M1 = jnp.min(xla.nonzero(magnitude_MH), axis=1, keepdims=True)
    low_M1, high_M1 = xla.bounds(largest_M1, smallest_M1)
    codes_ref[:, at] = xla.codes(x_MH, low_M1, high_M1, bits).astype(jnp.uint16)
    low_ref[:, t : t + 1] = low_M1
    high_ref[:, t : t + 1] = high_M1


def _decode_kernel(codes_ref, low_ref, high_ref, x_ref, *, bits):
  for t, at in enumerate(tpu.lanes(x_ref.shape[1])):
    low_M1, high_M1 = low_ref[:, t : t + 1], high_ref[:, t : t + 1]
    x_MH = xla.values(codes_ref[:, at].astype(jnp.int32), low_M1, high_M1, bits)
    x_ref[:, at] = x_MH.astype(x_ref.dtype)
