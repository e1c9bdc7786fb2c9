"""Loss of a trained model on the held-out text: `python -m dsv3_jax.evaluate WORKDIR`.

Prints bits per byte beside gzip -9 and xz -9 of the very same bytes, and writes them to
WORKDIR/evaluation.json. Runs on one device, whatever the model was trained on.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from dsv3_jax import config, console, mesh, runtime
from dsv3_jax.data import batches, corpora
from dsv3_jax.training import evaluation, state, workdir
from dsv3_jax.training.checkpoint import CheckpointError


def main(arguments: Sequence[str] | None = None) -> int:
  """Exit code: 0, or 2 after one line about what cannot work."""
  return console.run('evaluate', _parse, _run, arguments, file='workdir', told=(CheckpointError,))


def _run(args: argparse.Namespace) -> None:
  runtime.keep_freed_memory()
  runtime.log_warnings_only()
  # ---- model and text ----------------------------------------------------------------------------
  loaded = workdir.load(args.workdir, step=args.step, average=args.average)
  c = loaded.config
  if args.bytes is not None:
    c = config.check(dataclasses.replace(c, run=dataclasses.replace(c.run, eval_bytes=args.bytes)))
  corpus = corpora.open_corpus(c.data)
  heldout = batches.heldout_rows(c, corpus, loaded.tokenizer)
  # ---- loss --------------------------------------------------------------------------------------
  device_mesh = mesh.make_mesh(c.mesh)
  params, router_bias = state.split(loaded.model)
  nats = evaluation.make_nats(c, device_mesh)
  rows = min(c.batch.micro_size, len(heldout.tokens))
  result = evaluation.evaluate(nats, device_mesh, params, router_bias, heldout, rows)
  print(f'{loaded.name}: {result.table()}')
  result.save(args.workdir)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
  parser = console.Parser('python -m dsv3_jax.evaluate', description=__doc__.split('\n')[0])
  parser.add_argument('workdir', help='folder of a training run, or of imported weights')
  parser.add_argument('--step', type=int, help='checkpoint to take (the newest)')
  parser.add_argument('--average', action='store_true', help='take the average of the weights')
  parser.add_argument('--bytes', type=int, help='of held-out text, at most (run.eval_bytes)')
  return parser.parse_args(arguments)


if __name__ == '__main__':
  sys.exit(main())
