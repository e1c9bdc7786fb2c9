"""Records which experts a trained model chooses: `python -m dsv3_jax.trace WORKDIR --out=trace.npz`.

  python -m dsv3_jax.trace WORKDIR --out=trace.npz --tokens=100000
  python -m dsv3_jax.trace WORKDIR --out=trace.npz --text=book.txt

The main model reads held-out text, or the text of a file, and each token's choices in every MoE layer go
to the file (`dsv3_jax/parallel/trace.py` says how). Runs on one device, whatever the model was trained
on. MTP modules are not run.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence

import jax
import numpy as np

from dsv3_jax import config, console, mesh, runtime
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.parallel.trace import Trace
from dsv3_jax.training import reading, workdir
from dsv3_jax.training.checkpoint import CheckpointError

_TOKENS_AT_ONCE = 8192


def main(arguments: Sequence[str] | None = None) -> int:
  """Exit code: 0, or 2 after one line about what cannot work."""
  return console.run('trace', _parse, _run, arguments, file='out', told=(CheckpointError,))


def _run(args: argparse.Namespace) -> None:
  runtime.keep_freed_memory()
  runtime.log_warnings_only()
  # ---- model and text ----------------------------------------------------------------------------
  loaded = workdir.load(args.workdir, step=args.step, average=args.average)
  c = loaded.config
  tokens_BX, tokens = reading.rows(loaded, args.text, args.tokens)
  # ---- choices -----------------------------------------------------------------------------------
  chosen = make_choices(c.model, mesh.make_mesh(c.mesh))
  rows = min(max(_TOKENS_AT_ONCE // c.batch.seq_len, 1), len(tokens_BX))
  parts = []
  for i in range(0, len(tokens_BX), rows):
    part_BX = tokens_BX[i : i + rows]
    padded_BX = np.pad(part_BX, ((0, rows - len(part_BX)), (0, 0)))
    ids_YBLK = np.asarray(chosen(loaded.model, padded_BX[:, :-1])).astype(np.uint16)
    parts.append(ids_YBLK[:, : len(part_BX)])
  ids_YBLK = np.concatenate(parts, axis=1)
  ids_YTK = ids_YBLK.reshape(len(ids_YBLK), -1, c.model.moe.top_k)[:, :tokens]
  # ---- file --------------------------------------------------------------------------------------
  trace = Trace(
    ids_YTK,
    num_experts=c.model.moe.num_experts,
    num_groups=c.model.moe.num_groups,
    top_groups=c.model.moe.top_groups,
    rows=len(tokens_BX),
    seq_len=c.batch.seq_len,
    model=args.workdir,
    step=loaded.step,
    config=dataclasses.asdict(c),
  )
  trace.save(args.out)
  print(
    f'{loaded.name}: {tokens:,} tokens in {trace.layers} layers; fullest expert '
    f'{trace.load_Y.max():.2f} times the mean, in layer {trace.load_Y.argmax()}; {args.out}'
  )


def make_choices(
  c: config.Model, device_mesh: jax.sharding.Mesh
) -> Callable[[Transformer, np.ndarray], jax.Array]:
  """Jitted (model on one device, int32 tokens [B, L]) -> the main model's experts, int32 [Y, B, L, K]."""

  def run(model: Transformer, tokens_BL: jax.Array) -> jax.Array:
    _, routing_Y = model.hidden(c, model.embed(c, tokens_BL))
    return routing_Y.ids_BLK

  return reading.by_layer(device_mesh, run)


# ---- arguments -----------------------------------------------------------------------------------


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
  parser = console.Parser('python -m dsv3_jax.trace', description=__doc__.split('\n')[0])
  reading.add_arguments(parser, out='trace.npz', tokens=65_536)
  return reading.check(parser.parse_args(arguments))


if __name__ == '__main__':
  sys.exit(main())
