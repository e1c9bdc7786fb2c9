"""Loss of a trained model on the held-out text: `python -m dsv3_jax.evaluate WORKDIR`.

Prints bits per byte beside gzip -9 and xz -9 of the very same bytes, and writes them to
WORKDIR/evaluation.json. Runs on one device, whatever the model was trained on.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from dsv3_jax import config, mesh, runtime
from dsv3_jax.config import ConfigError
from dsv3_jax.data import batches, corpora
from dsv3_jax.training import evaluation, state, workdir
from dsv3_jax.training.checkpoint import CheckpointError


def main(arguments: Sequence[str] | None = None) -> int:
  """Exit code: 0, or 2 after one line about what cannot work."""
  parser = argparse.ArgumentParser(
    'python -m dsv3_jax.evaluate', description=__doc__.split('\n')[0]
  )
  parser.add_argument('workdir', help='folder of a training run')
  parser.add_argument('--step', type=int, help='checkpoint to take (the newest)')
  parser.add_argument('--average', action='store_true', help='take the average of the weights')
  parser.add_argument('--bytes', type=int, help='of held-out text, at most (run.eval_bytes)')
  args = parser.parse_args(arguments)
  try:
    _run(args)
  except (ConfigError, CheckpointError) as error:
    print(f'evaluate: {error}', file=sys.stderr)
    return 2
  except OSError as error:
    print(f'evaluate: {error.filename or args.workdir}: {error.strerror}', file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print(file=sys.stderr)
    return 130
  return 0


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
  print(f'checkpoint {loaded.step}: {result.table()}')
  result.save(args.workdir)


if __name__ == '__main__':
  sys.exit(main())
