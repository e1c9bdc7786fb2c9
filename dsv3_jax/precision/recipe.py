"""Precision recipes: what a linear layer does with its operands.

| recipe | operands and outputs                | sums | weights, their gradients' sum over micro-batches, moments |
|--------|-------------------------------------|------|-----------------------------------------------------------|
| fp32   | FP32                                | FP32 | FP32 (moments as `optimizer.moments`)                     |
| bf16   | BF16                                | FP32 | same; a micro-batch's weight gradient is rounded to BF16  |
| fp8    | E4M3 with scales, outputs BF16      | FP32 | same; weight gradients FP32 throughout                    |

In `fp8` (3.3) all three GEMMs of every linear layer of MLA and of every FFN, shared and routed experts
included, run in FP8. Embedding, head, router, the MTP modules' projection and the attention core do not.
Norms, softmax, router, rotary embedding and losses run in FP32 under every recipe (3.3.1).

`fp8_*` differ from it in one format each: what the report warns about, for comparison
(`python -m dsv3_jax.training.precision_study`).
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dsv3_jax.kernels import expert_ffn
from dsv3_jax.precision import experts, fp8
from dsv3_jax.precision.formats import Fp8


@dataclasses.dataclass(frozen=True)
class Recipe:
  compute: str  # dtype of activations, and of operands outside FP8
  weights: str  # dtype in which weights reach their matmuls: FP8 is cast from the FP32 masters
  fp8: Fp8 | None = None


RECIPES = {
  'fp32': Recipe('float32', 'float32'),
  'bf16': Recipe('bfloat16', 'bfloat16'),
  'fp8': Recipe('bfloat16', 'float32', Fp8()),
  'fp8_gradient_blocks': Recipe('bfloat16', 'float32', Fp8(gradient='e4m3_blocks')),
  'fp8_gradient_e5m2': Recipe('bfloat16', 'float32', Fp8(gradient='e5m2')),
  'fp8_sums_fp22': Recipe('bfloat16', 'float32', Fp8(sums='fp22')),
}


def compute_dtype(precision: str) -> jnp.dtype:
  """Dtype of activations and of matmul operands outside FP8."""
  return jnp.dtype(RECIPES[precision].compute)


def weight_dtype(precision: str) -> jnp.dtype:
  """Dtype in which weights reach their matmuls, and in which split ones travel there."""
  return jnp.dtype(RECIPES[precision].weights)


def serving(precision: str) -> str:
  """The recipe of generation: that of training, but BF16 where that was FP8.

  Decode would quantise every weight again for each token.
  """
  return 'bf16' if RECIPES[precision].fp8 else precision


def attention_stored(precision: str) -> str:
  """How the output of attention is kept for its backward and for that of the projection behind it."""
  return 'e5m6' if RECIPES[precision].fp8 else 'plain'


def linear(
  precision: str, x: jax.Array, weight: jax.Array, *, contract: int = 1, stored: str = 'e4m3'
) -> jax.Array:
  """Contracts the last `contract` axes of x with the first of weight, in x's dtype, summing in FP32.

  As one two-dimensional matmul: XLA:CPU runs those at full speed and general contractions not. `stored`:
  how FP8 keeps the input for the backward, 'e4m3' or (the output of attention) 'e5m6'.
  """
  lead, out = x.shape[: x.ndim - contract], weight.shape[contract:]
  size = math.prod(weight.shape[:contract])
  x2, w2 = x.reshape(-1, size), weight.reshape(size, -1)
  formats = RECIPES[precision].fp8
  y2 = fp8.linear(formats, x2, w2, stored=stored) if formats else jnp.dot(x2, w2.astype(x.dtype))
  return y2.reshape(*lead, *out)


def ffn(
  precision: str, x_BLD: jax.Array, gate_DF: jax.Array, up_DF: jax.Array, down_FD: jax.Array
) -> jax.Array:
  """SwiGLU: down(silu(gate x) * up x)."""
  formats = RECIPES[precision].fp8
  if formats:
    x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
    return fp8.ffn(formats, x_TD, gate_DF, up_DF, down_FD).reshape(x_BLD.shape)
  hidden = lambda w_DF: jax.ad_checkpoint.checkpoint_name(
    linear(precision, x_BLD, w_DF), 'ffn_hidden'
  )
  return linear(precision, jax.nn.silu(hidden(gate_DF)) * hidden(up_DF), down_FD)


def expert_slots(
  precision: str,
  how: str,
  x_TD: jax.Array,
  ids_TK: jax.Array,
  weight_TK: jax.Array,
  *weights: jax.Array,
  bound: int | None,
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
  """`kernels.expert_ffn.expert_slots` under a recipe; `how`: its implementation, outside FP8."""
  formats = RECIPES[precision].fp8
  if formats:
    return experts.expert_slots(formats, x_TD, ids_TK, weight_TK, *weights, bound=bound)
  return expert_ffn.expert_slots(x_TD, ids_TK, weight_TK, *weights, bound=bound, implementation=how)
