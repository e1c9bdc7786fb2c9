"""Precision recipes: what a linear layer does with its operands.

| recipe | operands and outputs | sums | weights, their gradients' sum over micro-batches, moments |
|--------|----------------------|------|-----------------------------------------------------------|
| fp32   | FP32                 | FP32 | FP32 (moments as `optimizer.moments`)                     |
| bf16   | BF16                 | FP32 | same; a micro-batch's weight gradient is rounded to BF16  |

Norms, softmax, router, rotary embedding and losses run in FP32 under every recipe (3.3.1).
"""

import jax
import jax.numpy as jnp

_COMPUTE = {'fp32': jnp.float32, 'bf16': jnp.bfloat16}


def compute_dtype(precision: str) -> jnp.dtype:
  """Dtype of activations and of matmul operands."""
  return jnp.dtype(_COMPUTE[precision])


def linear(x: jax.Array, weight: jax.Array, *, contract: int = 1) -> jax.Array:
  """Contracts the last `contract` axes of x with the first of weight, in x's dtype, summing in FP32.

  As one two-dimensional matmul: XLA:CPU runs those at full speed and general contractions not.
  """
  inner = weight.shape[:contract]
  lead, out = x.shape[: x.ndim - contract], weight.shape[contract:]
  size = 1
  for n in inner:
    size *= n
  x2 = x.reshape(-1, size)
  w2 = weight.astype(x.dtype).reshape(size, -1)
  return jnp.dot(x2, w2).reshape(*lead, *out)
