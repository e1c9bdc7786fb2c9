"""On TPU: `kernels/tpu_gemm.py`; the gradient is added up in place where XLA need not keep the old one."""

import jax
import jax.numpy as jnp

from dsv3_jax.kernels import tpu, tpu_gemm

supports = tpu.supports


def fp8_wgrad(
  a_MT: jax.Array,
  a_scale_Mt: jax.Array,
  b_NT: jax.Array,
  b_scale_Nt: jax.Array,
  *,
  accumulate: jax.Array | None,
) -> jax.Array:
  arrays = a_MT, a_scale_Mt, b_NT, b_scale_Nt
  return tpu_gemm.dense(*arrays, jnp.float32, accumulate, inside=fp8_wgrad)
