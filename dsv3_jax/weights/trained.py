"""The weights of a training checkpoint, copied into a `store` leaf by leaf.

An export asks for one matrix after another, layer by layer. A checkpoint keeps a leaf in as many
compressed chunks as devices saved it: on one device, all layers and experts in a single one, which every
matrix would have to unpack again. So it is unpacked once, along its chunks, into a store; memory is that
of one leaf's part on one device.

Reads what `training.checkpoint` has Orbax write, and with TensorStore only: params, biases, or their
average, and none of the moments.
"""

import itertools
import pathlib
from typing import Any

import tensorstore as ts

from dsv3_jax.config import ConfigError
from dsv3_jax.weights import store
from dsv3_jax.weights.meter import Meter


def copy(
  checkpoint: pathlib.Path, abstract: Any, folder: pathlib.Path, *, average: bool = False
) -> store.Store:
  """Copies {'params', 'router_bias'} of a checkpoint's folder into a store, and opens that.

  Args:
    abstract: their shapes.
    folder: of the store; one that was begun is gone on with, one that is whole is used as it is.

  Raises:
    ConfigError: the checkpoint is damaged or of another model, or the folder cannot be written.
  """
  leaves = store.leaves(abstract)
  with store.create(folder, leaves, origin(checkpoint, average)) as writer:
    if not writer.whole:
      with Meter('read checkpoint', sum(leaf.nbytes for leaf in leaves)) as meter:
        for leaf in leaves:
          _copy_leaf(checkpoint, leaf, writer, meter, average)
      writer.finish()
  return store.open(folder)


def origin(checkpoint: pathlib.Path, average: bool) -> str:
  """Tells checkpoints apart, also those of one step in one folder, written by one run after another."""
  written = (checkpoint / 'state' / 'manifest.ocdbt').stat().st_mtime_ns
  return f'{checkpoint.resolve()} {written} {"average" if average else "params"}'


def _copy_leaf(
  checkpoint: pathlib.Path, leaf: store.Leaf, writer: store.Writer, meter: Meter, average: bool
) -> None:
  if all(writer.done(leaf.path, at) for at in leaf.chunks()):
    meter.skip(leaf.nbytes)
    return
  saved = '.'.join(('ema', *leaf.path[1:]) if average and leaf.path[0] == 'params' else leaf.path)
  try:
    array = _open(checkpoint, saved)
    if tuple(array.shape) != leaf.shape:
      raise ConfigError(
        f'{checkpoint}: {saved} is {list(array.shape)} there, {list(leaf.shape)} in config.json'
      )
    steps = array.chunk_layout.read_chunk.shape[: leaf.lead]
    for start in itertools.product(
      *(range(0, n, k) for n, k in zip(leaf.shape, steps, strict=False))
    ):
      part = tuple(
        slice(i, min(i + k, n)) for i, k, n in zip(start, steps, leaf.shape, strict=False)
      )
      values = array[part].read().result()
      for at in itertools.product(*(range(s.stop - s.start) for s in part)):
        writer.write(leaf.path, tuple(i + j for i, j in zip(start, at, strict=True)), values[at])
      meter.add(values.nbytes)
      del values
  except ConfigError:
    raise
  except Exception as error:  # TensorStore raises ValueError for nearly everything
    reason = str(error).splitlines()[0].split(' [')[0][:200]
    raise ConfigError(
      f'{checkpoint}: {saved} cannot be read: {reason}; try another --step'
    ) from None


def _open(checkpoint: pathlib.Path, name: str) -> ts.TensorStore:
  base = f'file://{checkpoint.resolve() / "state"}/'
  kvstore = {'driver': 'ocdbt', 'base': base, 'path': f'{name}/'}
  spec = {'driver': 'zarr3', 'kvstore': kvstore, 'fill_missing_data_reads': False}
  return ts.open(spec, read=True).result()
