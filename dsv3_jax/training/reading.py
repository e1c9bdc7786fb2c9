"""What programs that watch a trained model have in common: its text, and their arguments."""

import argparse
import pathlib
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from dsv3_jax import mesh
from dsv3_jax.config import ConfigError
from dsv3_jax.data import batches, corpora, packing
from dsv3_jax.training import workdir


def rows(loaded: workdir.Loaded, text: str | None, most: int) -> tuple[np.ndarray, int]:
  """Rows of held-out tokens [n, seq_len + 1], and how many inputs in them count: text, and at most `most`.

  `text`: a file to read in place of what the run held out.

  Raises:
    ConfigError: the file is not UTF-8.
  """
  c, t = loaded.config, loaded.tokenizer
  if text is None:
    heldout = batches.heldout_rows(c, corpora.open_corpus(c.data), t)
    return _first(heldout.tokens, heldout.weights, most)
  try:
    document = t.encode(pathlib.Path(text).read_text(encoding='utf-8'))
  except UnicodeDecodeError as error:
    raise ConfigError(f'--text={text}: is not UTF-8 at byte {error.start}') from None
  tokens_BX, weight_BL = packing.pack_all(
    [np.array([t.bos_id, *document, t.eos_id], np.int32)], c.batch.seq_len, t.pad_id
  )
  return _first(tokens_BX, weight_BL, most)


def _first(tokens_BX: np.ndarray, weight_BL: np.ndarray, most: int) -> tuple[np.ndarray, int]:
  tokens = min(int(weight_BL.sum()), most)
  return tokens_BX[: -(-tokens // weight_BL.shape[1])], tokens


def by_layer(
  device_mesh: jax.sharding.Mesh, run: Callable[..., jax.Array]
) -> Callable[..., jax.Array]:
  """Jitted `run(model on one device, int32 tokens [B, L]) -> [Y, B, ..]`, on rows split over the mesh."""
  rows, layers = P(mesh.TOKENS), P(None, mesh.TOKENS)
  mapped = jax.shard_map(run, mesh=device_mesh, in_specs=(P(), rows), out_specs=layers)
  return jax.jit(mapped)


def add_arguments(parser: argparse.ArgumentParser, *, out: str, tokens: int) -> None:
  """workdir, --out (`out` is an example), --text, --tokens (at most that many), --step, --average."""
  add = parser.add_argument
  add('workdir', help='folder of a training run, or of imported weights')
  add('--out', required=True, help=f'the file to write, such as {out}')
  add('--text', metavar='FILE', help='text to read (held-out text of the run)')
  add('--tokens', type=int, default=tokens, help='at most (%(default)s)')
  add('--step', type=int, help='checkpoint to take (the newest)')
  add('--average', action='store_true', help='take the average of the weights')


def check(args: argparse.Namespace) -> argparse.Namespace:
  """Raises ConfigError for no tokens, and for an --out that cannot be written."""
  if args.tokens < 1:
    raise ConfigError(f'--tokens={args.tokens}: must be at least 1')
  out = pathlib.Path(args.out)
  if out.is_dir() or not out.parent.is_dir():
    why = 'is a folder; wants a file' if out.is_dir() else f'there is no folder {out.parent}'
    raise ConfigError(f'--out={args.out}: {why}')
  return args
