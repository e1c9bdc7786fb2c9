"""Small released checkpoints of random weights, made here: what tests convert."""

import json
import pathlib
from typing import Any

import ml_dtypes
import numpy as np

from dsv3_jax import config
from dsv3_jax.data import tokenizer
from dsv3_jax.weights import convert as program
from dsv3_jax.weights import names, shards, transfer

TEXTS = ['def f(x):\n  return x\n'] * 3
# Two blocks and a rest in a row, and blocks that hold parts of several heads.
ODD = {'model.dim': 160, 'model.mla.kv_rank': 136, 'model.mla.rope_dim': 12}
V2 = {
  'model.moe.scoring': 'softmax', 'model.moe.normalize': False, 'model.mtp_depth': 0,
  'model.mla.q_rank': 0,
}  # fmt: skip


def model(changes: dict[str, Any] | None = None) -> config.Model:
  """The debug model with some keys changed: {'model.dim': 16}."""
  d = config.debug(config.default())
  d.update_from_flattened_dict(changes or {})
  if d.model.moe.scoring == 'softmax':
    d.objective.bias_speed = 0.0
  return config.freeze(d).model


def chunks(m: config.Model, seed: int = 0) -> dict[tuple, np.ndarray]:
  """{(path, index): values} of the whole tree; BF16 numbers, and FP32 router biases."""
  rng = np.random.default_rng(seed)
  made = {}
  for path, index, shape in names.chunks(m):
    x = rng.standard_normal(shape, np.float32) * np.float32(0.1)
    is_bias = path[0] == 'router_bias'
    x = np.zeros_like(x) if is_bias and m.moe.scoring == 'softmax' else x
    made[path, index] = x if is_bias else x.astype(ml_dtypes.bfloat16)
  return made


def make(
  folder: pathlib.Path,
  m: config.Model,
  *,
  seed: int = 0,
  shard_bytes: int = 60_000,
  with_tokenizer: bool = True,
  scale_dtype: Any = np.float32,
  **kind: Any,
) -> dict[tuple, np.ndarray]:
  """Writes a checkpoint and returns its chunks; `kind` as of `transfer.Export`: dtype, fp8, ue8m0."""
  made = chunks(m, seed)
  export = transfer.Export(m, lambda path, index: made[path, index], **kind)
  is_scale = lambda name: name.endswith(names.SCALE)
  tensors = [(n, scale_dtype if is_scale(n) else d, s) for n, d, s in export.tensors]
  as_stored = dict((name, dtype) for name, dtype, _ in tensors)
  writer = shards.Writer(folder, tensors, shard_bytes, {'format': 'pt'})
  for shard in writer.shards():
    writer.write_shard(shard, lambda name: export.read(name).astype(as_stored[name], copy=False))
  (folder / 'config.json').write_text(json.dumps(export.config))
  if with_tokenizer:
    tokenizer.train(TEXTS, 300).save(folder / 'tokenizer.json')
  writer.finish()
  (folder / 'dsv3_export.json').unlink(missing_ok=True)
  return made


def assert_same_tensors(one: pathlib.Path, two: pathlib.Path) -> None:
  """Names, dtypes, shapes and bits of two checkpoints."""
  a, b = shards.Folder(one), shards.Folder(two)
  assert a.tensors.keys() == b.tensors.keys()
  for name, t in a.tensors.items():
    assert (t.dtype, t.shape) == (b.tensors[name].dtype, b.tensors[name].shape), name
    assert a.read(name).tobytes() == b.read(name).tobytes(), name


def files(folder: pathlib.Path) -> dict[str, bytes]:
  """{relative name: content} of everything in a folder."""
  return {
    str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()
  }


def convert(*arguments: Any) -> None:
  """Runs the program, which must succeed."""
  assert program.main([str(a) for a in arguments]) == 0


def refused(capsys: Any, *arguments: Any) -> list[str]:
  """The lines on stderr of a conversion that cannot work."""
  assert program.main([str(a) for a in arguments]) == 2
  err = capsys.readouterr().err
  assert err.startswith('convert: ') and 'Traceback' not in err
  return err.removeprefix('convert: ').splitlines()
