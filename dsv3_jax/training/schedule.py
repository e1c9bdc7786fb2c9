"""Everything that changes during training, as functions of tokens seen (4.2).

They take NumPy or JAX scalars and compute in float32: the step calls them on its own counters, so a
resumed run continues exactly, and programs call them on the host to print or plot.
"""

import math

import jax
import jax.numpy as jnp

from dsv3_jax import config

Scalar = jax.Array | float | int


def learning_rate(c: config.Optimizer, step: Scalar, tokens: Scalar) -> jax.Array:
  """Linear warm-up in steps, then peak | cosine to end_lr | end_lr | final_lr, by tokens."""
  tokens = jnp.asarray(tokens, jnp.float32)
  decay_end = c.constant_tokens + c.decay_tokens
  progress = jnp.clip((tokens - c.constant_tokens) / max(c.decay_tokens, 1.0), 0.0, 1.0)
  cosine = c.end_lr + (c.peak_lr - c.end_lr) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
  rate = jnp.where(tokens < c.constant_tokens, c.peak_lr, cosine)
  rate = jnp.where(tokens >= decay_end, c.end_lr, rate)
  rate = jnp.where(tokens >= decay_end + c.end_tokens, c.final_lr, rate)
  if not c.warmup_steps:
    return rate
  return rate * jnp.clip(jnp.asarray(step, jnp.float32) / c.warmup_steps, 0.0, 1.0)


def mtp_weight(c: config.Objective, tokens: Scalar) -> jax.Array:
  """lambda: 0.3 for the first 10T tokens, then 0.1."""
  return jnp.where(
    jnp.asarray(tokens, jnp.float32) < c.mtp_late_tokens, c.mtp_weight, c.mtp_weight_late
  )


def bias_speed(c: config.Objective, tokens: Scalar) -> jax.Array:
  """gamma: 0.001 until 14.3T tokens, then 0."""
  return jnp.where(jnp.asarray(tokens, jnp.float32) < c.bias_stop_tokens, c.bias_speed, 0.0)


def micro_batches(c: config.Batch, sequences: int) -> int:
  """Micro-batches of the step after `sequences` sequences were seen.

  The batch grows linearly in tokens from start_size to size over ramp_tokens, rounded down to whole
  micro-batches. A Python int: the host decides how much data it fetches.
  """
  tokens = sequences * c.seq_len
  size = c.size
  if tokens < c.ramp_tokens:
    size = c.start_size + (c.size - c.start_size) * tokens / c.ramp_tokens
  return int(size // c.micro_size)


def total_steps(c: config.Config) -> int:
  """Steps until `run.total_tokens` are seen."""
  sequences, steps = 0, 0
  target = math.ceil(c.run.total_tokens / c.batch.seq_len)
  ramp = math.ceil(c.batch.ramp_tokens / c.batch.seq_len)
  while sequences < min(ramp, target):
    sequences += micro_batches(c.batch, sequences) * c.batch.micro_size
    steps += 1
  return steps + max(0, -(-(target - sequences) // c.batch.size))
