"""The vendor's block-scaled product, by torch, as a peer: same codes, same scales, same way of timing."""

import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from dsv3_jax.kernels import choice


def product() -> Callable[[Sequence[Sequence[jax.Array]]], float] | None:
  """Seconds of one `torch._scaled_mm` of copies of (a, a_scale, b, b_scale); None without torch and a GPU."""
  if choice.platform() != 'gpu' or importlib.util.find_spec('torch') is None:
    return None
  torch = importlib.import_module('torch')
  if not torch.cuda.is_available():
    return None

  def call(
    a: jax.Array, a_scale: jax.Array, b: jax.Array, b_scale: jax.Array
  ) -> Callable[[], None]:
    codes = [
      torch.from_dlpack(jax.lax.bitcast_convert_type(x, jnp.uint8)).view(torch.float8_e4m3fn)
      for x in (a, b)
    ]
    # Scales of a lie column by column, those of b in rows of 16 bytes.
    a_s = torch.from_dlpack(a_scale).t().contiguous().t()
    wide = -(-b_scale.shape[1] // 4) * 4
    b_s = torch.zeros(b_scale.shape[0], wide, device='cuda')[:, : b_scale.shape[1]]
    b_s.copy_(torch.from_dlpack(b_scale))
    return lambda: torch._scaled_mm(
      codes[0], codes[1].t(), scale_a=a_s, scale_b=b_s.t(), out_dtype=torch.bfloat16
    )

  def measure(copies: Sequence[Sequence[jax.Array]]) -> float:
    calls = [call(*arrays) for arrays in copies]
    repeats = max(1, 20 // len(calls))
    found = []
    for _ in range(10):  # the first is for what is made ready once
      torch.cuda.synchronize()
      start = time.perf_counter()
      for _ in range(repeats):
        for each in calls:
          each()
      torch.cuda.synchronize()
      found.append((time.perf_counter() - start) / (repeats * len(calls)))
    return statistics.median(found[1:])

  return measure
