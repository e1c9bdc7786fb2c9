"""Choosing the next token from logits: greedy, temperature, nucleus.

The nucleus of `top_p`: sort the tokens by falling probability after the temperature, equal ones by
rising id; a token is kept where the sum of all before it is below top_p. That is the shortest run of
best tokens whose sum reaches top_p, and never empty. Probabilities and sums are FP32; top_p = 1 keeps
every token, whatever the rounding.

The random numbers of a token depend on the seed, on the number of its sample, and on its position
alone: a prompt is continued in the same way whatever else is in the batch.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from dsv3_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Sampling:
  temperature: float = 0.8  # 0: the most probable token, the lowest id among equals
  top_p: float = 0.95
  seed: int = 0

  def __post_init__(self) -> None:
    if not 0 <= self.temperature < math.inf:
      raise ConfigError(f'temperature = {self.temperature}: must be 0 (greedy) or more')
    if not 0 < self.top_p <= 1:
      raise ConfigError(f'top_p = {self.top_p}: must be above 0 and at most 1')
    if not 0 <= self.seed < 2**32:
      raise ConfigError(f'seed = {self.seed}: must be 0 or more, and below 2^32')


def sample(
  s: Sampling, logits_BV: jax.Array, sample_B: jax.Array, position_B: jax.Array
) -> jax.Array:
  """Next token of each sequence, int32 [B].

  `sample_B` tells apart the samples of one prompt; `position_B` is where the token will stand.
  """
  if s.temperature == 0:
    return jnp.argmax(logits_BV, axis=1).astype(jnp.int32)
  # From the largest down, so that a tiny temperature gives -inf and not inf - inf.
  logits_BV = logits_BV.astype(jnp.float32)
  logits_BV = (logits_BV - jnp.max(logits_BV, axis=1, keepdims=True)) / s.temperature

  def draw(logits_V: jax.Array, sample: jax.Array, position: jax.Array) -> jax.Array:
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(s.seed), sample), position)
    if s.top_p == 1:
      return jax.random.categorical(key, logits_V)
    order_V, kept_V = nucleus(logits_V, s.top_p)
    return order_V[jax.random.categorical(key, jnp.where(kept_V, logits_V[order_V], -jnp.inf))]

  return jax.vmap(draw)(logits_BV, sample_B, position_B).astype(jnp.int32)


def nucleus(logits_V: jax.Array, top_p: float) -> tuple[jax.Array, jax.Array]:
  """Ids by falling probability [V], and whether each of them is kept [V]."""
  order_V = jnp.argsort(logits_V, descending=True, stable=True)
  prob_V = jax.nn.softmax(logits_V)[order_V]
  return order_V, jnp.cumsum(prob_V) - prob_V < top_p
