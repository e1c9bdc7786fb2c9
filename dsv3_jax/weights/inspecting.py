"""What a folder of weights holds, and whether that is what its config asks for."""

import collections
import math
import pathlib
from collections.abc import Callable, Iterable

from dsv3_jax import counts
from dsv3_jax.training import workdir
from dsv3_jax.training.checkpoint import Checkpointer
from dsv3_jax.weights import store, transfer


def run(folder: str, say: Callable[[str], None]) -> int:
  """Describes a released checkpoint or a folder of ours; 0, or 1 where something is wrong with it.

  Raises:
    ConfigError (FormatError): it is neither, or cannot be read at all.
  """
  path = pathlib.Path(folder)
  ours = (path / workdir.WEIGHTS).exists() or (path / workdir.CHECKPOINTS).exists()
  return _ours(path, say) if ours else _released(path, say)


def _released(path: pathlib.Path, say: Callable[[str], None]) -> int:
  released = transfer.open_released(path)
  folder, hf = released.tensors, released.hf
  stored = 'FP8, UE8M0 scales' if hf.ue8m0 else 'FP8' if hf.fp8 else 'not quantised'
  say(f'{path}: {hf.family}, {stored}; {_model(hf.model)}')
  say(
    f'{len(folder.files)} files, {folder.total_bytes / 1e9:.3f} GB, {len(folder.tensors)} tensors'
  )
  for line in _by_dtype((str(t.dtype), t.shape) for t in folder.tensors.values()):
    say(line)
  for note in hf.notes:
    say(note)
  findings = released.findings()
  for line in findings.lines:
    say(line)
  faults = len(findings.lines)
  say(f'{faults} faults' if faults else 'as its config asks for: nothing missing, extra or of another shape or dtype')  # fmt: skip
  return 1 if faults else 0


def _ours(path: pathlib.Path, say: Callable[[str], None]) -> int:
  c = workdir.read_config(path)
  say(f'{path}: {_model(c.model)}')
  if not (path / workdir.WEIGHTS).exists():
    with Checkpointer(path / workdir.CHECKPOINTS, c.checkpoint) as checkpointer:
      steps = checkpointer.steps()
    say(f'training run with checkpoints {", ".join(map(str, steps)) or "none"}')
    return 0 if steps else 1
  weights = store.open(path / workdir.WEIGHTS)
  say(f'imported weights, {weights.nbytes / 1e9:.3f} GB in {len(weights.leaves)} leaves')
  for line in _by_dtype((str(leaf.dtype), leaf.shape) for leaf in weights.leaves.values()):
    say(line)
  missing = weights.missing()
  for line in missing:
    say(f'missing {line}')
  return 1 if missing else 0


def _model(m) -> str:
  layers = f'{m.num_dense_layers} dense and {m.num_layers - m.num_dense_layers} MoE layers'
  mtp = f', MTP depth {m.mtp_depth}' if m.mtp_depth else ''
  experts = f'{m.moe.num_experts} experts, {m.moe.top_k} active, {m.moe.num_shared} shared'
  return f'{counts.parameters(m):,} parameters, {layers}{mtp}, {experts}'


def _by_dtype(found: Iterable[tuple[str, tuple[int, ...]]]) -> list[str]:
  tensors: collections.Counter[str] = collections.Counter()
  numbers: collections.Counter[str] = collections.Counter()
  for dtype, shape in found:
    tensors[dtype] += 1
    numbers[dtype] += math.prod(shape)
  return [f'  {d:<16} {tensors[d]:>7} arrays {numbers[d]:>18,} numbers' for d in sorted(tensors)]
