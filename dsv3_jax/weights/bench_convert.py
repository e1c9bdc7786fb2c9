"""Time and memory of converting a synthetic checkpoint, both ways, beside a plain copy of its files.

  python -m dsv3_jax.weights.bench_convert --folder=/tmp/bench_convert --json=bench_convert.json

Makes a checkpoint of random bits (BF16, V3's structure, 4.4 GB in shards of 0.5 GB; `--scale` makes more
or less of it), then in processes of their own: a copy of its files, `convert import`, `convert export`,
and the same with FP8 codes and scales, which are also imported as BF16. Copies are flushed to the disk, as conversions are. Memory is the
kernel's own record of the peak resident size (VmHWM) beyond that of a process that only imported the
program. Needs four times the checkpoint's size on the disk.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence

import numpy as np

from dsv3_jax import config
from dsv3_jax.weights import fp8, shards, transfer

_PEAK = 'import re; print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])'
_CONVERT = f'import sys; from dsv3_jax.weights import convert; c = convert.main(sys.argv[1:]); {_PEAK}; sys.exit(c)'  # fmt: skip
_IDLE = f'from dsv3_jax.weights import convert; {_PEAK}'
_COPY = """
import os, pathlib, shutil, sys
to = pathlib.Path(sys.argv[2])
to.mkdir()
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
  shutil.copyfile(path, to / path.name)
  with open(to / path.name, 'rb+') as file:
    os.fsync(file.fileno())
"""


def main(arguments: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    'python -m dsv3_jax.weights.bench_convert', description=__doc__.split('\n')[0]
  )
  parser.add_argument('--folder', default='/tmp/bench_convert', help='made, and removed at the end')
  parser.add_argument(
    '--scale', type=float, default=1.0, help='experts, as a part of 72 (%(default)s)'
  )
  parser.add_argument('--shard_mb', type=int, default=500, help='size of a shard (%(default)s)')
  parser.add_argument('--json', help='file for the figures')
  args = parser.parse_args(arguments)
  folder = pathlib.Path(args.folder)
  folder.mkdir(parents=True)
  try:
    figures = measure(folder, args.scale, args.shard_mb * 10**6)
  finally:
    shutil.rmtree(folder)
  print(table(figures))
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(figures, indent=2) + '\n', encoding='utf-8')
  return 0


def measure(folder: pathlib.Path, scale: float, shard_bytes: int) -> dict:
  """Figures of every conversion: seconds, bytes written, peak above idle in shards."""
  m = model(scale)
  idle = _run(_IDLE)[1]
  figures: dict = {'idle_mb': idle / 1e6, 'cpus': len(os.sched_getaffinity(0)), 'runs': {}}
  for kind in ('bf16', 'fp8'):
    source, copy = folder / kind, folder / 'copy'
    make(source, m, shard_bytes, kind)
    whole = shards.Folder(source)
    work, back = folder / 'work', folder / 'back'
    to_bf16 = {'to bf16': (_CONVERT, 'import', source, folder / 'bf16')} if kind == 'fp8' else {}
    steps = to_bf16 | {
      'copy': (_COPY, source, copy),
      'import': (_CONVERT, 'import', source, work, f'--dtype={kind}'),
      'export': (_CONVERT, 'export', work, back, f'--shard_size={shard_bytes}'),
    }
    for step, (code, *rest) in steps.items():
      seconds, peak = _run(code, *rest)
      figures['runs'][f'{kind} {step}'] = {
        'seconds': seconds,
        'gb': whole.total_bytes / 1e9,
        'shards': len(whole.files),
        'largest_shard_mb': whole.largest_shard_bytes / 1e6,
        'peak_above_idle_mb': (peak - idle) / 1e6 if peak else None,
        'peak_in_shards': (peak - idle) / whole.largest_shard_bytes if peak else None,
      }
    same(source, back)
    for path in folder.iterdir():
      shutil.rmtree(path)
  for name, run in figures['runs'].items():
    run['times_copy'] = run['seconds'] / figures['runs'][f'{name.split()[0]} copy']['seconds']
  return figures


def model(scale: float) -> config.Model:
  """Every part of V3 in a small form; at scale 1 it weighs 4.4 GB in BF16."""
  d = config.default()
  d.model.update(vocab_size=32_768, dim=2048, ffn_dim=4096, num_layers=4, num_dense_layers=1)
  d.model.mla.update(num_heads=16, q_rank=512, kv_rank=512)
  d.model.moe.update(num_experts=max(int(72 * scale) // 8 * 8, 16), expert_dim=1024)
  return config.freeze(d).model


def make(folder: pathlib.Path, m: config.Model, shard_bytes: int, kind: str) -> None:
  """Writes the checkpoint: finite random bits in every tensor."""
  noise = np.random.default_rng(0).integers(0, 2**16, 1 << 22, np.uint16)
  noise &= 0xBFFF  # below 2 in magnitude: no NaN, no infinity
  size = lambda shape: int(np.prod(shape))

  def values(dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    if dtype == np.float32:
      return np.full(shape, 0.01, np.float32)
    bits = noise.view(np.uint8) & 0xF7 if dtype == fp8.E4M3 else noise
    return np.resize(bits, size(shape)).view(dtype).reshape(shape)

  export = transfer.Export(m, lambda path, index: None, fp8=kind == 'fp8')
  specs = {name: (dtype, shape) for name, dtype, shape in export.tensors}
  writer = shards.Writer(folder, export.tensors, shard_bytes, {'format': 'pt'})
  text = json.dumps(export.config, indent=2) + '\n'
  (folder / 'config.json').write_text(text, encoding='utf-8')
  for shard in writer.shards():
    writer.write_shard(shard, lambda name: values(*specs[name]))
  writer.finish()


def same(folder: pathlib.Path, other: pathlib.Path) -> None:
  """Raises unless two checkpoints hold the same tensors, bit by bit."""
  one, two = shards.Folder(folder), shards.Folder(other)
  if one.tensors.keys() != two.tensors.keys():
    raise AssertionError(f'{folder} and {other} hold different tensors')
  for name, t in one.tensors.items():
    a, b = one.read(name), two.read(name)
    if t.dtype != two.tensors[name].dtype or not np.array_equal(a.view(np.uint8), b.view(np.uint8)):
      raise AssertionError(f'{name} differs in {folder} and {other}')


def table(figures: dict) -> str:
  lines = [f'idle process {figures["idle_mb"]:.0f} MB, {figures["cpus"]} CPUs']
  for name, run in figures['runs'].items():
    line = f'{name:<12} {run["gb"]:.2f} GB in {run["shards"]} shards  {run["seconds"]:6.1f} s'
    line += f'  {1e3 * run["gb"] / run["seconds"]:6.0f} MB/s  {run["times_copy"]:5.2f} x copy'
    if run['peak_in_shards'] is not None:
      line += (
        f'  peak {run["peak_above_idle_mb"]:.0f} MB above idle = {run["peak_in_shards"]:.2f} shards'
      )
    lines.append(line)
  return '\n'.join(lines)


def _run(code: str, *args: object) -> tuple[float, int]:
  """Seconds, and the peak in bytes that the process printed last; 0 where it prints none."""
  environment = os.environ | {'JAX_PLATFORMS': 'cpu'}
  began = time.perf_counter()
  ended = subprocess.run(
    [sys.executable, '-c', code, *map(str, args)],
    stdout=subprocess.PIPE,
    text=True,
    check=True,
    env=environment,
  )
  seconds = time.perf_counter() - began
  lines = ended.stdout.split()
  return seconds, int(lines[-1]) * 1024 if lines else 0


if __name__ == '__main__':
  sys.exit(main())
