"""Kernels on one Hopper GPU: checked against float64, then timed beside what else does the same there.

    python -m dsv3_jax.kernels.bench --out=h200.json          # 10 minutes at most
    python -m dsv3_jax.kernels.bench --tune                   # measures tiles, writes kernels/tuned/KIND.json
    python -m dsv3_jax.kernels.bench --quick                  # tiny shapes on any machine: does it run
    python -m dsv3_jax.kernels.bench --plain                  # XLA's products of codes beside float32 dots, anywhere

Needs jax alone; torch, where it is at hand, adds the vendor's own block-scaled product. First the card's
ceilings (copy, BF16 product, FP8 product), then every kernel on normal and on all-positive data with
K = 4096, where sums that are not promoted lose 7e-2, twice for the same bits; then `bench_cases`. Writes
JSON with device, versions and date after every row; a case that fails is a row that says so. Times are
medians of programs of up to 16 calls, each on copies of the operands, which together exceed L2: started one
by one, calls of some microseconds would be timed by the starting.
"""

import argparse
import datetime
import functools
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# torch, where it is, shares the memory.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.kernels import bench_torch, hopper, tuning
from dsv3_jax.kernels import hopper_gemm as hg
from dsv3_jax.kernels.bench_cases import NK, Arrays, cases, normal, product
from dsv3_jax.kernels.fp8_matmul import fp8_matmul
from dsv3_jax.kernels.fp8_wgrad import fp8_wgrad
from dsv3_jax.kernels.grouped_matmul import grouped_matmul, masked_matmul
from dsv3_jax.kernels.grouped_wgrad import grouped_wgrad
from dsv3_jax.kernels.mla_decode import PAGE, mla_decode
from dsv3_jax.kernels.quantize import quantize_blocks, quantize_tiles, quantize_tiles_transposed

Row = dict[str, Any]
_L2 = 64 * 2**20
_LIMITS = {'normal': 5e-4, 'positive': 2e-3}  # relative, Frobenius, against float64 of the codes
_ATTENTION = 4e-3  # the same of attention, whose probabilities and output are BF16
_SIZES = [(1024, 1024, 1024), (2048, 2048, 2048), (4096, 2048, 2048), (4096, 4096, 7168)]  # --plain


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--out', type=pathlib.Path, help='JSON of all results')
  parser.add_argument('--quick', action='store_true', help='tiny shapes, a run each')
  parser.add_argument(
    '--tune', action='store_true', help='measure tiles instead, and keep the best'
  )
  parser.add_argument(
    '--plain', action='store_true', help="XLA's products of codes beside float32 dots instead"
  )
  arguments = parser.parse_args()
  quick = arguments.quick
  report = {'device': jax.devices()[0].device_kind, 'versions': _versions(), 'date': _now()}
  report |= {'quick': quick, 'times': []}

  def keep(row: Row) -> None:
    """What was measured outlives a run that is cut off."""
    report['times'].append(row)
    _show(row)
    if arguments.out:
      arguments.out.write_text(json.dumps(report, indent=1) + '\n', encoding='utf-8')

  if arguments.plain:
    report['implementation'] = 'xla'
    for row in beside_plain_dots(quick):
      keep(row)
    return
  why = hopper.refusal()
  if why and not quick:
    sys.exit(f'bench: figures are of the Mosaic GPU kernels: {why}; --quick runs anywhere, by XLA')
  if arguments.tune:
    tune(quick)
    return
  report |= {'implementation': 'xla' if why else 'mosaic_gpu'}
  report |= {'ceilings': ceilings(quick), 'checks': checks(quick)}
  for row in times(quick):
    keep(row)
  wrong = [row for row in report['checks'] if not row['ok']]
  broken = [row for row in report['times'] if 'error' in row]
  if wrong or broken:
    sys.exit(f'bench: {len(wrong)} checks and {len(broken)} cases failed')


def ceilings(quick: bool) -> Row:
  """Copy bandwidth in TB/s, read and write counted; TFLOP/s of XLA's products of random squares."""
  n = 256 if quick else 8192
  seconds = _time(lambda x: x + jnp.bfloat16(1), (normal(n, 4 * n, dtype=jnp.bfloat16),), quick)
  found = {'copy_tb_s': 2 * 2 * 4 * n * n / seconds / 1e12}
  for dtype in (jnp.bfloat16, jnp.float8_e4m3fn):
    square = tuple(normal(n, n, seed=s).astype(dtype) for s in range(2))
    seconds = _time(product, square, quick)
    found[f'{jnp.dtype(dtype).name}_tflop_s'] = 2 * n**3 / seconds / 1e12
  _show(found)
  return found


def checks(quick: bool) -> list[Row]:
  """Each product against float64 of its codes, and its bits a second time; quantisers against XLA's bits."""
  M, N, K = (128, 128, 256) if quick else (512, 384, 4096)
  rows = []
  for data, draw in (('normal', normal), ('positive', _positive)):
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
  rows.append(_check_attention(quick))
  for row in rows:
    _show(row)
  return rows


def _check_attention(quick: bool) -> Row:
  """Ragged rows, one of them empty, and pages of NaN behind their ends, against float64."""
  B, L, N, J, rank = (3, 2, 16, 3, 128) if quick else (8, 2, 128, 20, 512)
  q, pages = (
    normal(*s, dtype=jnp.bfloat16) for s in ((B, L, N, rank + 64), (B * J, PAGE, rank + 64))
  )
  last = np.linspace(-1, J * PAGE - 1, B).astype(np.int32)  # of each row
  positions = np.maximum(last[:, None] - np.arange(L, dtype=np.int32)[::-1], -1)
  flat = jnp.arange(J * PAGE)[None, :, None]
  behind = flat > jnp.asarray(last)[:, None, None]
  pages = jnp.where(behind, jnp.nan, pages.reshape(B, J * PAGE, -1)).reshape(pages.shape)
  table = jnp.arange(B * J, dtype=jnp.int32).reshape(B, J)
  run = jax.jit(functools.partial(mla_decode, rank=rank, scale=0.1))
  got, again = (run(q, pages, table, jnp.asarray(positions)) for _ in range(2))
  keys = np.nan_to_num(np.asarray(pages, np.float64).reshape(B, J * PAGE, -1))
  score = 0.1 * np.einsum('blnx,bmx->blnm', np.asarray(q, np.float64), keys)
  seen = np.arange(J * PAGE) <= positions[:, :, None, None]
  weight = np.where(seen, np.exp(score), 0)
  total = np.maximum(weight.sum(axis=3, keepdims=True), np.finfo(float).tiny)
  expected = np.einsum('blnm,bmc->blnc', weight / total, keys[..., :rank])
  error = np.linalg.norm(np.asarray(got[0], np.float64) - expected) / np.linalg.norm(expected)
  same = all(np.array_equal(*map(np.asarray, pair)) for pair in zip(got, again, strict=True))
  ok = bool(error < _ATTENTION and same)
  return {
    'check': 'mla_decode', 'data': 'normal', 'error': float(error), 'repeats': same, 'ok': ok
  }  # fmt: skip


def times(quick: bool) -> Iterator[Row]:
  """One row per case: microseconds, TFLOP/s, TB/s, and microseconds of what stands beside it."""
  scaled = bench_torch.product()
  for case in cases(quick):
    row = {'op': case.op, **case.shape}
    try:
      copies = _copies(case.make(), quick)
      seconds = _time_of(case.function, copies, quick)
      row['us'] = 1e6 * seconds
      if case.flops:
        row['tflop_s'] = case.flops / seconds / 1e12
      row['tb_s'] = case.moved / seconds / 1e12
      if scaled is not None and case.op == 'fp8_matmul':
        row['torch_us'] = 1e6 * scaled(copies)
      del copies
      for name, (function, make) in case.peers.items():
        row[f'{name}_us'] = 1e6 * _time(function, make(), quick)
    except Exception as error:
      row['error'] = f'{type(error).__name__}: {error}'[:500]
    yield row


def beside_plain_dots(quick: bool) -> Iterator[Row]:
  """XLA's products of codes on this machine, as multiples of a float32 dot of the same size; quantising apart.

  Runs take turns, and the least times count: what else the machine does only adds to them. On a busy one
  `cpu_times_dot`, of the seconds that its processors worked for this, is the steadier figure.
  """
  by_xla = lambda op, **how: jax.jit(functools.partial(op, implementation='xla', **how))
  plain = jax.jit(functools.partial(jnp.einsum, 'MK,NK->MN'))
  E, f32 = 4, jnp.float32
  for M, N, K in [(256, 128, 128)] if quick else _SIZES:
    x, w = normal(M, K), normal(N, K, seed=1)
    a, b, c = quantize_tiles(x), quantize_blocks(w), quantize_tiles(w)
    stacked, sizes = [jnp.stack([v] * E) for v in b], jnp.full((E,), M // E, jnp.int32)
    tokens = jnp.full((E,), K // E, jnp.int32)
    runs = {
      'dot': (plain, (x, w)),
      'fp8_matmul': (by_xla(fp8_matmul, out_dtype=f32), (*a, *b)),
      'fp8_wgrad': (by_xla(fp8_wgrad), (*a, *c)),
      'grouped_matmul': (by_xla(grouped_matmul, out_dtype=f32), (*a, *stacked, sizes)),
      'grouped_wgrad': (by_xla(grouped_wgrad), (*a, *c, tokens)),
      'quantize_tiles': (by_xla(quantize_tiles), (x,)),
      'quantize_blocks': (by_xla(quantize_blocks), (w,)),
    }
    found = {name: [] for name in runs}
    for i in range(2 if quick else 30 if M * N * K < 1e10 else 8):
      for name, (run, arrays) in runs.items():
        before = time.perf_counter(), time.process_time()
        jax.block_until_ready(run(*arrays))
        after = time.perf_counter(), time.process_time()
        if i:  # the first compiles
          found[name].append([b - a for a, b in zip(before, after, strict=True)])
    least = {name: np.min(each, axis=0) for name, each in found.items()}
    for name in list(runs)[1:]:
      wall, cpu = (float(x) for x in least[name] / least['dot'])
      row = {'op': name, 'M': M, 'N': N, 'K': K, 'us': 1e6 * float(least[name][0])}
      row |= {'dot_us': 1e6 * float(least['dot'][0])}
      yield row | {'times_dot': wall, 'cpu_times_dot': cpu}


def tune(quick: bool) -> None:
  """The fastest tile of each product's shapes, into the table of this kind of card."""
  if quick:
    sys.exit('bench: --tune measures, --quick does not: give one of them')
  found: dict[str, dict[str, Row]] = {}
  candidates = [hg.Tiling(*t) for t in ((128, 64), (128, 128), (128, 192), (64, 128), (64, 256))]
  for N, K in NK:
    b = quantize_blocks(normal(N, K, seed=1))
    for M in (64, 128, 4096):
      a, best = quantize_tiles(normal(M, K)), None
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


def _tiled(tiling: hg.Tiling, *arrays: jax.Array) -> jax.Array:
  token = tuning.forced.set(tiling)
  try:
    return fp8_matmul(*arrays, implementation='mosaic_gpu')
  finally:
    tuning.forced.reset(token)


def _time(op: Callable[..., Any], arrays: Arrays, quick: bool) -> float:
  return _time_of(op, _copies(arrays, quick), quick)


def _copies(arrays: Arrays, quick: bool) -> list[Arrays]:
  """Together more than L2 holds, at most 16."""
  size = sum(x.nbytes for x in arrays)
  more = 0 if quick else min(15, 2 * _L2 // size)
  return [arrays] + [tuple(jnp.copy(x) for x in arrays) for _ in range(more)]


def _time_of(op: Callable[..., Any], copies: Sequence[Arrays], quick: bool) -> float:
  """Median seconds of a call, of 9 runs of programs that call it once on each of `copies`."""
  each = jax.jit(op)  # lowered once, where it would be once for every copy
  run = jax.jit(lambda copies: [each(*arrays) for arrays in copies])
  jax.block_until_ready(run(copies))
  found, runs = [], 1 if quick else 4
  for _ in range(1 if quick else 9):
    start = time.perf_counter()
    for _ in range(runs):
      out = run(copies)
    jax.block_until_ready(out)
    found.append((time.perf_counter() - start) / (runs * len(copies)))
  return statistics.median(found)


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
