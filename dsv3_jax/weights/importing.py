"""A released checkpoint into a folder that the programs work on.

  WORKDIR/config.json      the model as config.json of the checkpoint has it, everything else to try it out
  WORKDIR/tokenizer.json   its tokenizer, and the small files that go back out with an export
  WORKDIR/weights/         the weights, by `store`; whole when its manifest is there

Everything that can be wrong is looked for before anything is written: the config, every header, names,
shapes and dtypes, the scales' values, the stored copies. Then one chunk after another is read, put into
our layout and written; the next one is made while the last ones go to disk.
"""

import hashlib
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable

import numpy as np

from dsv3_jax import config
from dsv3_jax.config import ConfigError
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.training import workdir
from dsv3_jax.weights import fp8, names, scales, shards, store, transfer
from dsv3_jax.weights.meter import Meter
from dsv3_jax.weights.names import Slot
from dsv3_jax.weights.transpose import contiguous

# Beside tokenizer.json; only passed on.
SMALL_FILES = (
  'tokenizer_config.json', 'generation_config.json', 'special_tokens_map.json', 'chat_template.jinja',
)  # fmt: skip
_SHOWN = 10  # faults


def run(source: str, target: str, dtype: str, say: Callable[[str], None]) -> None:
  """Imports the folder `source` into the new folder `target`; goes on where it was interrupted.

  Args:
    dtype: 'bf16' | 'fp32' | 'fp8': what matrices and norms are kept as; router biases stay FP32.
      'fp8' keeps the codes and scales of the checkpoint.

  Raises:
    ConfigError (FormatError): the source is not a whole checkpoint of a model that we have, or the
      target holds something else, or cannot be written.
  """
  released = transfer.open_released(source)
  folder = released.tensors
  for note in released.hf.notes:
    say(note)
  # ---- what can be wrong -------------------------------------------------------------------------
  faults = released.findings().lines
  if faults:
    more = [f'and {len(faults) - _SHOWN} more; inspect lists all'] if len(faults) > _SHOWN else []
    raise ConfigError('\n'.join(f'{source}: {line}' for line in [*faults[:_SHOWN], *more]))
  c = new_config(released.hf.model)
  to = pathlib.Path(target)
  if (to / workdir.CHECKPOINTS).exists():
    raise ConfigError(f'{target}: holds a training run; name a new folder')
  leaves = _leaves(released, dtype, source)
  origin = digest(folder, dtype)
  whole = store.is_whole(to / workdir.WEIGHTS)
  if not whole:
    _check_scales(released, folder)
    released.compare_copies()
  text, told = _tokenizer(pathlib.Path(source), c)
  say(told)
  # ---- the folder and its small files ------------------------------------------------------------
  about = {'scale_fmt': 'ue8m0'} if released.hf.ue8m0 and dtype == 'fp8' else {}
  _require_room(to, 0 if whole else sum(leaf.nbytes for leaf in leaves.values()))
  workdir.claim(to, c)
  with store.create(to / workdir.WEIGHTS, leaves.values(), origin, about) as writer:
    if text is not None:
      write_whole(to / workdir.TOKENIZER, text)
    for name in SMALL_FILES:
      if pathlib.Path(source, name).is_file():
        write_whole(to / name, pathlib.Path(source, name).read_bytes())
    if writer.whole:
      say(f'{target} holds these weights already')
      return
    _copy(released, leaves, writer)
    if dtype == 'fp8':
      scales.write(writer.folder, folder, released.slots, origin)
    writer.finish()


def _copy(
  released: transfer.Released, leaves: dict[store.Path, store.Leaf], writer: store.Writer
) -> None:
  """Chunk after chunk in the order of the checkpoint's files, but those that are there."""
  chunks = sorted(names.chunks(released.hf.model), key=lambda chunk: _position(released, chunk[:2]))
  size = lambda path, shape: math.prod(shape) * leaves[path].dtype.itemsize
  with Meter('import', sum(size(path, shape) for path, _, shape in chunks)) as meter:
    for path, index, shape in chunks:
      if writer.done(path, index):
        meter.skip(size(path, shape))
        continue
      if leaves[path].dtype == fp8.E4M3:
        array = _codes(released, path, index)
      else:
        array = released.read(path, index, leaves[path].dtype)
      writer.write(path, index, contiguous(array))
      meter.add(size(path, shape))


def new_config(m: config.Model) -> config.Config:
  """The config of an import: the model, and the smallest batch that `evaluate` can run."""
  length = min(m.max_length, config.Batch.seq_len)
  batch = config.Batch(seq_len=length, size=1, start_size=1, ramp_tokens=0.0, micro_size=1)
  tokens = min(config.Run.total_tokens, 2.0**31 * length)
  no_bias = m.moe.scoring == 'softmax'
  objective = config.Objective(bias_speed=0.0) if no_bias else config.Objective()
  run = config.Run(total_tokens=tokens)
  return config.check(config.Config(model=m, batch=batch, objective=objective, run=run))


def digest(folder: shards.Folder, dtype: str) -> str:
  """Tells apart what is converted: every file's name, size and time of its last change."""
  listed = []
  for name in ['config.json', *folder.files]:
    at = (folder.folder / name).stat()
    listed.append((name, at.st_size, at.st_mtime_ns))
  return hashlib.sha256(json.dumps([dtype, listed]).encode()).hexdigest()


# ---- parts ---------------------------------------------------------------------------------------


def _leaves(released: transfer.Released, dtype: str, source: str) -> dict[store.Path, store.Leaf]:
  """Our leaves, as they will be stored."""
  found: dict[store.Path, store.Leaf] = {}
  kept = store.DTYPES['bf16' if dtype == 'fp8' else dtype]
  for path, index, shape in names.chunks(released.hf.model):
    slot = released.slot(path, index)
    leaf_dtype = store.DTYPES['fp32'] if path[0] == 'router_bias' else kept
    if dtype == 'fp8' and slot is not None and slot.quantised:
      _require_codes(released, slot, source)
      leaf_dtype = fp8.E4M3
    before = found[path].shape[: len(index)] if path in found else (0,) * len(index)
    lead = tuple(max(n, i + 1) for n, i in zip(before, index, strict=True))
    found[path] = store.Leaf(path, leaf_dtype, (*lead, *shape))
  return found


def _require_codes(released: transfer.Released, slot: Slot, source: str) -> None:
  stored = released.tensors.tensors[slot.name].dtype
  if stored != fp8.E4M3:
    raise ConfigError(f'--dtype=fp8: {slot.name} in {source} is {stored}; use bf16 or fp32')
  if slot.part:
    raise ConfigError(f'--dtype=fp8: {source} keeps experts stacked; use bf16 or fp32')


def _require_room(to: pathlib.Path, nbytes: int) -> None:
  """What an interrupted import has written counts as free: it is not written again."""
  at = next(p for p in (to.absolute(), *to.absolute().parents) if p.exists())
  there = sum(f.stat().st_size for f in (to / workdir.WEIGHTS).glob('*/*') if f.is_file())
  free = shutil.disk_usage(at).free
  if nbytes > free + there:
    raise ConfigError(f'{to}: needs {nbytes / 1e9:.1f} GB, the disk has {(free + there) / 1e9:.1f}')


def _codes(released: transfer.Released, path: store.Path, index: store.Index) -> np.ndarray:
  """One chunk's codes. Their scales are checked before anything is written."""
  slot = released.slot(path, index)
  codes = released.tensors.read(slot.name)
  if ((codes.view(np.uint8) & 0x7F) == 0x7F).any():
    raise shards.FormatError(f'{released.tensors.tensors[slot.name].path}: {slot.name} holds NaN')
  return slot.to_ours(codes)


def _check_scales(released: transfer.Released, folder: shards.Folder) -> None:
  """All scales are finite and positive. They are a 4,000th of the weights."""
  for name, (slot, *_) in names.tensor_slots(released.slots).items():
    if name in folder.tensors and folder.tensors[name].dtype == fp8.E4M3:
      scale = folder.read(names.scale_name(slot)).astype(np.float32)
      if not (np.isfinite(scale) & (scale > 0)).all():
        bad = scale[~(np.isfinite(scale) & (scale > 0))][0]
        where = folder.tensors[names.scale_name(slot)]
        raise shards.FormatError(
          f'{where.path}: {where.name} holds {bad}; scales must be finite and above 0'
        )


def _position(released: transfer.Released, chunk: tuple[store.Path, store.Index]) -> tuple:
  """Where a chunk lies in the checkpoint, to read that from its beginning to its end."""
  slot = released.slot(*chunk)
  if slot is None:
    return ('', 0, ())
  at = released.tensors.tensors[slot.name]
  return (str(at.path), at.offset, slot.part)


def _tokenizer(source: pathlib.Path, c: config.Config) -> tuple[bytes | None, str]:
  """The tokenizer's file and a line about it. One that cannot serve is passed on all the same."""
  path = source / workdir.TOKENIZER
  if not path.is_file():
    return None, f'{source}: has no tokenizer.json: generate and evaluate will ask for one'
  text = path.read_bytes()
  try:
    size = Tokenizer(text.decode('utf-8')).vocab_size
  except Exception as error:  # the tokenizers package raises nothing narrower
    return text, f'{path}: cannot be used by generate and evaluate: {error}'
  if size > c.model.vocab_size:
    right = f'the model has {c.model.vocab_size}'
    return text, f'{path}: cannot be used by generate and evaluate: has {size} tokens, {right}'
  return text, f'{path}: {size:,} tokens'


def write_whole(path: pathlib.Path, content: bytes) -> None:
  """Whole or not at all. What a kill leaves is overwritten by the next run; the same is left alone."""
  partial = path.with_name(f'.{path.name}.partial')
  try:
    if path.is_file() and path.read_bytes() == content:
      return
    partial.write_bytes(content)
    os.replace(partial, path)
  except OSError as error:
    raise ConfigError(f'{path}: cannot be written: {error.strerror}') from None
