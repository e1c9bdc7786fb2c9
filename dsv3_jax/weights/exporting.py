"""A folder of ours, imported or trained, as a checkpoint that transformers loads.

  HF_FOLDER/config.json, tokenizer.json, ...                      the small files first
  HF_FOLDER/model-00001-of-000NN.safetensors, ... and their index    the index last: it makes a checkpoint

One tensor after another is read, put into the released layout and written, so that memory is that of
the largest one. What is stored as codes leaves as the same codes and scales.
"""

import concurrent.futures
import contextlib
import json
import pathlib
import shutil
from collections.abc import Callable, Sequence

import numpy as np

from dsv3_jax import config
from dsv3_jax.config import ConfigError
from dsv3_jax.data.tokenizer import BOS, EOS, PAD
from dsv3_jax.training import state, workdir
from dsv3_jax.training.checkpoint import Checkpointer
from dsv3_jax.weights import importing, names, scales, shards, store, trained, transfer
from dsv3_jax.weights.meter import Meter
from dsv3_jax.weights.transpose import contiguous

_STAGED = '.checkpoint'  # a trained model's weights, while they are exported


def run(
  source: str,
  target: str,
  *,
  dtype: str | None,
  shard_bytes: int,
  step: int | None,
  average: bool,
  say: Callable[[str], None],
) -> None:
  """Exports the folder `source` into the new folder `target`; goes on where it was interrupted.

  Args:
    dtype: 'bf16' | 'fp32' | 'fp8'; None is that of imported weights, and 'bf16' for a trained model.
    step: the checkpoint of a trained model; None is the newest.
    average: the average of a trained model's weights.

  Raises:
    ConfigError (FormatError): the source holds no model that can be exported, or the target holds
      something else, or cannot be written.
  """
  to = pathlib.Path(target)
  c = workdir.read_config(source)
  imported = pathlib.Path(source, workdir.WEIGHTS)
  weights, checkpoint = None, None
  if imported.exists():
    if average or step is not None:
      asked = '--average' if average else f'--step={step}'
      raise ConfigError(f'{asked}: {source} holds imported weights, which have neither')
    weights = store.open(imported)
    dtype = dtype or next(k for k, v in store.DTYPES.items() if v == _main_dtype(weights))
    origin, about = weights.source, weights.about
  else:
    checkpoint = _checkpoint(pathlib.Path(source), c, step, average)
    dtype = dtype or 'bf16'
    origin, about = trained.origin(checkpoint, average), {}
  kept = scales.open_scales(weights) if weights and weights.fp8 and dtype == 'fp8' else None

  def chunk(path: store.Path, index: store.Index) -> np.ndarray:
    """In the released layout's order of bytes, under our order of axes: what is left is to copy."""
    order = slots[path, index].order
    return contiguous(weights.read(path, index).transpose(np.argsort(order))).transpose(order)

  # ---- what will be there ------------------------------------------------------------------------
  export = transfer.Export(
    c.model,
    chunk,
    dtype=store.DTYPES['fp32' if dtype == 'fp32' else 'bf16'],
    fp8=dtype == 'fp8',
    ue8m0=about.get('scale_fmt') == 'ue8m0',
    read_scales=scales.open_scales(weights).read if weights and weights.fp8 else None,
  )
  slots = names.chunk_slots(names.table(c.model, family=export.config['model_type']))
  as_kept = lambda name: kept is not None and name.endswith(names.SCALE)
  tensors = [
    (name, kept.tensors[name].dtype if as_kept(name) else stored, shape)
    for name, stored, shape in export.tensors
  ]
  writer = shards.Writer(to, tensors, shard_bytes, {'format': 'pt'}, f'{origin} {dtype}')
  _write_small_files(pathlib.Path(source), to, export.config, say)
  # ---- tensors -----------------------------------------------------------------------------------
  staged = to / _STAGED
  if checkpoint and not all(shard.done for shard in writer.shards()):
    at = state.layout(c)
    abstract = {'params': at.params, 'router_bias': at.router_bias}
    weights = trained.copy(checkpoint, abstract, staged, average=average)
  with Meter('export', sum(shard.nbytes for shard in writer.shards())) as meter:

    def read(name: str) -> np.ndarray:
      x = kept.read(name) if as_kept(name) else export.read(name)
      meter.add(x.nbytes)
      return contiguous(x)

    for shard in writer.shards():
      if shard.done:
        meter.skip(shard.nbytes)
      else:
        with _Ahead(read, shard.names) as next_one:
          writer.write_shard(shard, next_one)
  if staged.exists():
    shutil.rmtree(staged)
  writer.finish()


class _Ahead(contextlib.AbstractContextManager):
  """Calls `read` with names in their order, each while the one before it is written."""

  def __init__(self, read: Callable[[str], np.ndarray], order: Sequence[str]) -> None:
    self._read, self._rest = read, iter(order)
    self._pool = concurrent.futures.ThreadPoolExecutor(1)
    self._start()

  def __call__(self, name: str) -> np.ndarray:
    del name  # they are asked for in the order that is known
    result = self._next.result()
    self._start()
    return result

  def __exit__(self, *exception: object) -> None:
    self._pool.shutdown(cancel_futures=True)

  def _start(self) -> None:
    name = next(self._rest, None)
    self._next = None if name is None else self._pool.submit(self._read, name)


def _checkpoint(
  source: pathlib.Path, c: config.Config, step: int | None, average: bool
) -> pathlib.Path:
  """The folder of the checkpoint to export."""
  if average and not c.optimizer.ema_decay:
    raise ConfigError(
      f'{source}: its run keeps no average of the weights (optimizer.ema_decay = 0)'
    )
  with Checkpointer(source / workdir.CHECKPOINTS, c.checkpoint) as checkpointer:
    steps = checkpointer.steps()
  if not steps:
    raise ConfigError(f'{source}: has no checkpoint yet')
  if step is not None and step not in steps:
    raise ConfigError(f'--step={step}: {source} has {", ".join(map(str, steps))}')
  return source / workdir.CHECKPOINTS / str(steps[-1] if step is None else step)


def _main_dtype(weights: store.Store) -> np.dtype:
  """That of its matrices."""
  return store.DTYPES['fp8'] if weights.fp8 else weights.leaves['params', 'embed_VD'].dtype


def _write_small_files(
  source: pathlib.Path, to: pathlib.Path, values: dict, say: Callable[[str], None]
) -> None:
  importing.write_whole(to / 'config.json', (json.dumps(values, indent=2) + '\n').encode())
  for name in (workdir.TOKENIZER, *importing.SMALL_FILES):
    if (source / name).is_file():
      importing.write_whole(to / name, (source / name).read_bytes())
  if (source / workdir.CHECKPOINTS).exists():  # ours, which transformers has no class for
    values = {'tokenizer_class': 'PreTrainedTokenizerFast', 'add_bos_token': True}
    values |= {'bos_token': BOS, 'eos_token': EOS, 'pad_token': PAD}
    importing.write_whole(
      to / 'tokenizer_config.json', (json.dumps(values, indent=2) + '\n').encode()
    )
  if not (source / workdir.TOKENIZER).is_file():
    say(f'{source}: has no tokenizer.json, so neither has {to}')
