"""Public function of the expert FFN, and its reference."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dsv3_jax.kernels.expert_ffn import few, xla


def expert_ffn(
  x_TD: jax.Array,
  ids_TK: jax.Array,
  weight_TK: jax.Array,
  gate_EDF: jax.Array,
  up_EDF: jax.Array,
  down_EFD: jax.Array,
  *,
  bound: int | None = None,
  implementation: str = 'xla',
) -> jax.Array:
  """y_t = sum_k weight_tk * down_i(silu(gate_i x_t) * up_i x_t) with i = ids_tk -> [T, D] in x's dtype.

  `ids_TK`: int32 in 0..E-1; E itself means "not here" and contributes nothing. A token's ids differ.
  Any load is served, from an expert without a token to one with all of them. `bound`: the caller's word
  that at most so many of the T*K choices are here; buffers need no more slots then. `implementation`:
  'xla' and 'reference' are differentiable in x, weight_TK and the three weights; 'packed' and 'each', for
  few rows (`few`), are not, and 'fastest' is the one that the shapes ask for where nothing is differentiated.
  """
  y, total = expert_slots(
    x_TD, ids_TK, weight_TK, gate_EDF, up_EDF, down_EFD, bound=bound, implementation=implementation
  )
  return total(y)


def expert_slots(
  x_TD: jax.Array,
  ids_TK: jax.Array,
  weight_TK: jax.Array,
  gate_EDF: jax.Array,
  up_EDF: jax.Array,
  down_EFD: jax.Array,
  *,
  bound: int | None = None,
  implementation: str = 'xla',
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
  """`expert_ffn` in two steps: outputs before the sum over a token's choices, and what sums them."""
  if implementation == 'fastest':
    implementation = _fastest(ids_TK.size if bound is None else bound, len(x_TD), len(gate_EDF))
  whole = {'reference': _reference, 'packed': few.packed, 'each': few.each}
  if implementation in whole:
    summed_TD = whole[implementation](x_TD, ids_TK, weight_TK, gate_EDF, up_EDF, down_EFD)
    return summed_TD, lambda y_TD: y_TD
  if implementation != 'xla':
    right = "must be 'xla', 'packed', 'each', 'fastest' or 'reference'"
    raise ValueError(f'implementation = {implementation!r}: {right}')
  return xla.slots(bound, x_TD, ids_TK, weight_TK, gate_EDF, up_EDF, down_EFD)


def _fastest(choices: int, rows: int, experts: int) -> str:
  if rows > xla.SMALL:
    return 'xla'
  return 'each' if choices < experts else 'packed'


def _reference(x_TD, ids_TK, weight_TK, gate_EDF, up_EDF, down_EFD):
  E = gate_EDF.shape[0]
  chosen_TKE = jax.nn.one_hot(ids_TK, E, dtype=weight_TK.dtype)  # an id of E gives a row of zeros
  weight_TE = jnp.einsum('TK,TKE->TE', weight_TK, chosen_TKE)
  gate_TEF = jnp.einsum('TD,EDF->TEF', x_TD, gate_EDF)
  up_TEF = jnp.einsum('TD,EDF->TEF', x_TD, up_EDF)
  hidden_TEF = jax.nn.silu(gate_TEF) * up_TEF * weight_TE[:, :, None].astype(x_TD.dtype)
  return jnp.einsum('TEF,EFD->TD', hidden_TEF, down_EFD)
