"""FP8 kernels on one Hopper GPU: checked against float64, then timed beside what else multiplies there.

    python -m dsv3_jax.kernels.bench --out=h200.json          # 10 minutes at most
    python -m dsv3_jax.kernels.bench --tune                   # measures tiles, writes kernels/tuned/KIND.json
    python -m dsv3_jax.kernels.bench --quick                  # tiny shapes on any machine: does it run

Needs jax alone; torch, where it is at hand, adds the vendor's own block-scaled product. First the card's
ceilings (copy, BF16 product, FP8 product), then every kernel on normal and on all-positive data with
K = 4096, where sums that are not promoted lose 7e-2, twice for the same bits; then the shapes of DeepSeek-V3
by which DeepGEMM is measured. Writes JSON with device, versions and date. Times are medians
of runs over copies of the operands that together exceed L2.
"""

import argparse
import datetime
import functools
import importlib
import importlib.util
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

# torch, where it is, shares the memory.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.kernels import choice, hopper, tuning
from dsv3_jax.kernels import hopper_gemm as hg
from dsv3_jax.kernels.fp8_matmul import fp8_matmul
from dsv3_jax.kernels.fp8_wgrad import fp8_wgrad
from dsv3_jax.kernels.grouped_matmul import grouped_matmul, masked_matmul
from dsv3_jax.kernels.grouped_wgrad import grouped_wgrad
from dsv3_jax.kernels.quantize import (
  quantize_blocks,
  quantize_tiles,
  quantize_tiles_transposed,
  requantize_transposed,
)
from dsv3_jax.kernels.swiglu_quantize import swiglu_quantize

Row = dict[str, Any]
_NK = [(2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)]
_L2 = 64 * 2**20
_LIMITS = {'normal': 5e-4, 'positive': 2e-3}  # relative, Frobenius, against float64 of the codes


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--out', type=pathlib.Path, help='JSON of all results')
  parser.add_argument('--quick', action='store_true', help='tiny shapes, a run each')
  parser.add_argument(
    '--tune', action='store_true', help='measure tiles instead, and keep the best'
  )
  arguments = parser.parse_args()
  quick = arguments.quick
  why = hopper.refusal()
  if why and not quick:
    sys.exit(f'bench: figures are of the Mosaic GPU kernels: {why}; --quick runs anywhere, by XLA')
  if arguments.tune:
    tune(quick)
    return

  report = {'device': jax.devices()[0].device_kind, 'versions': _versions(), 'date': _now()}
  report |= {'implementation': 'xla' if why else 'mosaic_gpu', 'quick': quick}
  report |= {'ceilings': ceilings(quick), 'checks': checks(quick)}
  report['times'] = []
  for row in times(quick):
    report['times'].append(row)
    _show(row)
    if arguments.out:  # what was measured outlives a run that is cut off
      arguments.out.write_text(json.dumps(report, indent=1) + '\n', encoding='utf-8')
  failed = [row for row in report['checks'] if not row['ok']]
  if failed:
    sys.exit(f'bench: {len(failed)} checks failed')


def ceilings(quick: bool) -> Row:
  """Copy bandwidth in TB/s, read and write counted; TFLOP/s of XLA's products of random squares."""
  n = 256 if quick else 8192
  seconds = _time(lambda x: x + jnp.bfloat16(1), [_normal(n, 4 * n, dtype=jnp.bfloat16)], quick)
  found = {'copy_tb_s': 2 * 2 * 4 * n * n / seconds / 1e12}
  for dtype in (jnp.bfloat16, jnp.float8_e4m3fn):
    square = [_normal(n, n, seed=s).astype(dtype) for s in range(2)]
    seconds = _time(_product, square, quick)
    found[f'{jnp.dtype(dtype).name}_tflop_s'] = 2 * n**3 / seconds / 1e12
  _show(found)
  return found


def checks(quick: bool) -> list[Row]:
  """Each product against float64 of its codes, and its bits a second time; quantisers against XLA's bits."""
  M, N, K = (128, 128, 256) if quick else (512, 384, 4096)
  rows = []
  for data, draw in (('normal', _normal), ('positive', _positive)):
    x, y = draw(M, K), draw(N, K, seed=1)
    a, b, c = quantize_tiles(x), quantize_blocks(y), quantize_tiles(y)
    a_f64, b_f64, c_f64 = _f64(*a, 1), _f64(*b, 128), _f64(*c, 1)
    sizes = jnp.array([128, 0, M - 128], jnp.int32)
    experts = [jnp.stack([w] * 3) for w in b]
    one = jnp.array([M - 1], jnp.int32)
    dense = a_f64 @ b_f64.T
    short = dense.copy()
    short[-1] = 0
    tokens = jnp.array([K], jnp.int32)
    cases = {
      'fp8_matmul': (functools.partial(fp8_matmul, out_dtype=jnp.float32), (*a, *b), dense),
      'fp8_wgrad': (fp8_wgrad, (*a, *c), a_f64 @ c_f64.T),
      'grouped_matmul': (
        functools.partial(grouped_matmul, out_dtype=jnp.float32),
        (*a, *experts, sizes),
        dense,
      ),
      'masked_matmul': (
        functools.partial(masked_matmul, out_dtype=jnp.float32),
        (*(v[None] for v in (*a, *b)), one),
        short[None],
      ),
      'grouped_wgrad': (grouped_wgrad, (*a, *c, tokens), (a_f64 @ c_f64.T)[None]),
    }
    for name, (op, arrays, expected) in cases.items():
      run = jax.jit(op)
      got, again = np.asarray(run(*arrays)), np.asarray(run(*arrays))
      error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
      same = np.array_equal(got, again)
      ok = bool(error < _LIMITS[data] and same)
      rows.append({'check': name, 'data': data, 'error': float(error), 'repeats': same, 'ok': ok})
    for op in (quantize_tiles, quantize_tiles_transposed, quantize_blocks):
      got, expected = jax.jit(op)(x), jax.jit(functools.partial(op, implementation='xla'))(x)
      ok = all(
        np.array_equal(*(np.asarray(v, np.float32) for v in p))
        for p in zip(got, expected, strict=True)
      )
      rows.append({'check': op.__name__, 'data': data, 'bits': ok, 'ok': ok})
  for row in rows:
    _show(row)
  return rows


def times(quick: bool) -> Iterator[Row]:
  """One row per shape: microseconds, TFLOP/s or TB/s, and the same of what stands beside it."""
  scaled = _torch_product()
  shrink = (lambda n: max(128, n // 64 // 128 * 128)) if quick else (lambda n: n)
  for M in (128,) if quick else (64, 128, 4096):
    for N, K in _NK[:1] if quick else _NK:
      N, K = shrink(N), shrink(K)
      x, w = _normal(M, K), _normal(N, K, seed=1)
      a, b = quantize_tiles(x), quantize_blocks(w)
      row = _row('fp8_matmul', fp8_matmul, (*a, *b), 2 * M * N * K, quick, M=M, N=N, K=K)
      half = [v.astype(jnp.bfloat16) for v in (x, w)]
      row['bf16_us'] = 1e6 * _time(_product, half, quick)
      if scaled is not None:
        row['torch_us'] = 1e6 * scaled(*a, *b)
      yield row
  for E, M, N, K in _groups(quick, ((4, 8192), (8, 4096))):
    a, b = quantize_tiles(_normal(E * M, K)), quantize_blocks(_normal(E, N, K, seed=1))
    sizes = jnp.full((E,), M, jnp.int32)
    row = _row(
      'grouped_matmul',
      grouped_matmul,
      (*a, *b, sizes),
      2 * E * M * N * K,
      quick,
      E=E,
      M=M,
      N=N,
      K=K,
    )
    row['loop_us'] = 1e6 * _time(functools.partial(_loop, E, M), (*a, *b), quick)
    yield row
  for E, M, N, K in _groups(quick, ((1, 1024), (2, 512), (4, 256))):
    a = [v.reshape(E, M, -1) for v in quantize_tiles(_normal(E * M, K))]
    b, sizes = quantize_blocks(_normal(E, N, K, seed=1)), jnp.full((E,), M, jnp.int32)
    yield _row(
      'masked_matmul', masked_matmul, (*a, *b, sizes), 2 * E * M * N * K, quick, E=E, M=M, N=N, K=K
    )
  for T, M, N in ((256, 128, 128),) if quick else ((4096, 4096, 7168), (4096, 7168, 2048)):
    a, b = quantize_tiles(_normal(M, T)), quantize_tiles(_normal(N, T, seed=1))
    yield _row('fp8_wgrad', fp8_wgrad, (*a, *b), 2 * M * N * T, quick, M=M, N=N, K=T)
    sizes = jnp.full((2,), T // 2, jnp.int32)
    yield _row(
      'grouped_wgrad', grouped_wgrad, (*a, *b, sizes), 2 * M * N * T, quick, E=2, M=M, N=N, K=T
    )
  M, K = (128, 256) if quick else (4096, 7168)
  x = _normal(M, K, dtype=jnp.bfloat16)
  for op in (quantize_tiles, quantize_tiles_transposed, quantize_blocks):
    yield _row(op.__name__, op, (x,), 0, quick, moved=3 * M * K, M=M, K=K)
  codes = quantize_tiles(x)
  yield _row(
    'requantize_transposed', requantize_transposed, codes, 0, quick, moved=2 * M * K, M=M, K=K
  )
  yield _row('swiglu_quantize', swiglu_quantize, (x, x), 0, quick, moved=5 * M * K, M=M, K=K)


def tune(quick: bool) -> None:
  """The fastest tile of each product's shapes, into the table of this kind of card."""
  if quick:
    sys.exit('bench: --tune measures, --quick does not: give one of them')
  found: dict[str, dict[str, Row]] = {}
  candidates = [hg.Tiling(*t) for t in ((128, 64), (128, 128), (128, 192), (64, 128), (64, 256))]
  for N, K in _NK:
    b = quantize_blocks(_normal(N, K, seed=1))
    for M in (64, 128, 4096):
      a, best = quantize_tiles(_normal(M, K)), None
      for tiling in candidates:
        if N % tiling.columns:
          continue
        seconds = _time(functools.partial(_tiled, tiling), (*a, *b), quick)
        if best is None or seconds < best[0]:
          best = seconds, tiling
      entry = {name: getattr(best[1], name) for name in ('rows', 'columns', 'stages', 'width')}
      entry['microseconds'] = 1e6 * best[0]
      found.setdefault(tuning.key('fp8_matmul', N, K), {})[str(tuning.bucket(M))] = entry
      _show({'N': N, 'K': K, 'M': M} | entry)
  file = tuning.path(jax.devices()[0].device_kind)
  file.parent.mkdir(exist_ok=True)
  table = {'device': jax.devices()[0].device_kind, 'versions': _versions(), 'date': _now()}
  file.write_text(json.dumps(table | {'tiles': found}, indent=1) + '\n', encoding='utf-8')


def _row(
  name: str,
  op: Callable[..., Any],
  arrays: tuple[jax.Array, ...],
  flops: int,
  quick: bool,
  moved: int = 0,
  **shape: int,
) -> Row:
  seconds = _time(op, arrays, quick)
  row = {'op': name, **shape, 'us': 1e6 * seconds}
  return row | ({'tflop_s': flops / seconds / 1e12} if flops else {'tb_s': moved / seconds / 1e12})


def _groups(
  quick: bool, groups: tuple[tuple[int, int], ...]
) -> Iterator[tuple[int, int, int, int]]:
  if quick:
    yield 2, 128, 128, 256
    return
  for E, M in groups:
    yield E, M, 4096, 7168
    yield E, M, 7168, 2048


def _loop(E: int, M: int, *arrays: jax.Array) -> list[jax.Array]:
  """A dense product for each group."""
  a, a_scale, b, b_scale = arrays
  part = lambda x, e: x[e * M : (e + 1) * M]
  return [fp8_matmul(part(a, e), part(a_scale, e), b[e], b_scale[e]) for e in range(E)]


def _tiled(tiling: hg.Tiling, *arrays: jax.Array) -> jax.Array:
  token = tuning.forced.set(tiling)
  try:
    return fp8_matmul(*arrays, implementation='mosaic_gpu')
  finally:
    tuning.forced.reset(token)


def _product(x_MK: jax.Array, y_NK: jax.Array) -> jax.Array:
  out = jnp.einsum('MK,NK->MN', x_MK, y_NK, preferred_element_type=jnp.float32)
  return out.astype(jnp.bfloat16)


def _time(op: Callable[..., Any], arrays: Any, quick: bool) -> float:
  """Median seconds of a call, of 9 batches; what it costs to start one call is hidden by those before it."""
  run = jax.jit(op)
  size = sum(x.nbytes for x in arrays)
  copies = [arrays]
  if not quick:
    copies += [jax.tree.map(jnp.copy, list(arrays)) for _ in range(min(16, 2 * _L2 // size))]
  jax.block_until_ready([run(*each) for each in copies])
  found, calls = [], 1 if quick else 20
  for _ in range(1 if quick else 9):
    start = time.perf_counter()
    outs = [run(*copies[i % len(copies)]) for i in range(calls)][-1]
    jax.block_until_ready(outs)
    found.append((time.perf_counter() - start) / calls)
  return statistics.median(found)


def _torch_product() -> Callable[..., float] | None:
  """Seconds of torch's block-scaled product of the same codes; None without torch or a GPU of its own."""
  if choice.platform() != 'gpu' or importlib.util.find_spec('torch') is None:
    return None
  torch = importlib.import_module('torch')

  if not torch.cuda.is_available():
    return None
  as_torch = lambda x: torch.from_dlpack(x)

  def measure(a: jax.Array, a_scale: jax.Array, b: jax.Array, b_scale: jax.Array) -> float:
    codes = [
      as_torch(jax.lax.bitcast_convert_type(x, jnp.uint8)).view(torch.float8_e4m3fn) for x in (a, b)
    ]
    # Scales of a lie column by column, those of b in rows of 16 bytes.
    a_s = as_torch(a_scale).t().contiguous().t()
    wide = -(-b_scale.shape[1] // 4) * 4
    b_s = torch.zeros(b_scale.shape[0], wide, device='cuda')[:, : b_scale.shape[1]]
    b_s.copy_(as_torch(b_scale))
    call = lambda: torch._scaled_mm(
      codes[0], codes[1].t(), scale_a=a_s, scale_b=b_s.t(), out_dtype=torch.bfloat16
    )
    call()
    found = []
    for _ in range(9):
      torch.cuda.synchronize()
      start = time.perf_counter()
      for _ in range(20):
        call()
      torch.cuda.synchronize()
      found.append((time.perf_counter() - start) / 20)
    return statistics.median(found)

  return measure


def _normal(*shape: int, seed: int = 0, dtype: Any = jnp.float32) -> jax.Array:
  return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def _positive(*shape: int, seed: int = 0) -> jax.Array:
  return jax.random.uniform(jax.random.key(seed), shape)


def _f64(codes: jax.Array, scale: jax.Array, rows: int) -> np.ndarray:
  spread = np.repeat(np.repeat(np.asarray(scale, np.float64), 128, axis=1), rows, axis=0)
  return np.asarray(codes, np.float64) * spread[: codes.shape[0], : codes.shape[1]]


def _versions() -> Row:
  return {'jax': jax.__version__, 'python': sys.version.split()[0], 'numpy': np.__version__}


def _now() -> str:
  return datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')


def _show(row: Row) -> None:
  told = (f'{k} {v:.4g}' if isinstance(v, float) else f'{k} {v}' for k, v in row.items())
  print('  '.join(told), flush=True)


if __name__ == '__main__':
  main()
