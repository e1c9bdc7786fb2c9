"""Records what a trained model's FFNs add to the residual: `python -m dsv3_jax.activations WORKDIR --out=..`

  python -m dsv3_jax.activations WORKDIR --out=activations.npz --tokens=2000

The main model reads held-out text, or the text of a file, and each token's output of every FFN, experts
and shared expert together, goes to the file (`dsv3_jax/codesign/branches.py` says how): what a combine
carries, for the study of number formats. Runs on one device; MTP modules are not run.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsv3_jax import config, console, mesh, runtime
from dsv3_jax.codesign.branches import Branches
from dsv3_jax.model.transformer import Block, Transformer
from dsv3_jax.training import reading, workdir
from dsv3_jax.training.checkpoint import CheckpointError


def main(arguments: Sequence[str] | None = None) -> int:
  """Exit code: 0, or 2 after one line about what cannot work."""
  return console.run('activations', _parse, _run, arguments, file='out', told=(CheckpointError,))


def _run(args: argparse.Namespace) -> None:
  runtime.keep_freed_memory()
  runtime.log_warnings_only()
  loaded = workdir.load(args.workdir, step=args.step, average=args.average)
  c = loaded.config
  tokens_BX, tokens = reading.rows(loaded, args.text, args.tokens)
  branches = make_branches(c.model, mesh.make_mesh(c.mesh))
  parts = [np.asarray(branches(loaded.model, row_X[None, :-1])) for row_X in tokens_BX]
  values_YBLD = np.concatenate(parts, axis=1)
  values_YTD = values_YBLD.reshape(len(values_YBLD), -1, c.model.dim)[:, :tokens]
  Branches(values_YTD, args.workdir, loaded.step).save(args.out)
  size = float(np.sqrt(np.mean(np.square(values_YTD))))
  print(f'{loaded.name}: {tokens:,} tokens in {len(values_YTD)} layers, rms {size:.3g}; {args.out}')


def make_branches(
  c: config.Model, device_mesh: jax.sharding.Mesh
) -> Callable[[Transformer, np.ndarray], jax.Array]:
  """Jitted (model on one device, int32 tokens [B, L]) -> what each FFN adds, float32 [Y, B, L, D]."""

  def run(model: Transformer, tokens_BL: jax.Array) -> jax.Array:
    valid_BL = jnp.ones(tokens_BL.shape, bool)

    def layer(x_BLD: jax.Array, block: Block) -> tuple[jax.Array, jax.Array]:
      x_BLD = block.attend(c, x_BLD)
      y_BLD, _ = block.branch(c, x_BLD, valid_BL)
      return x_BLD + y_BLD, y_BLD.astype(jnp.float32)

    x_BLD, branches = model.embed(c, tokens_BL), []
    for layers in ([model.dense_layers] if c.num_dense_layers else []) + [model.moe_layers]:
      x_BLD, y_YBLD = lax.scan(layer, x_BLD, layers)
      branches.append(y_YBLD)
    return jnp.concatenate(branches)

  return reading.by_layer(device_mesh, run)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
  parser = console.Parser('python -m dsv3_jax.activations', description=__doc__.split('\n')[0])
  reading.add_arguments(parser, out='activations.npz', tokens=2048)
  return reading.check(parser.parse_args(arguments))


if __name__ == '__main__':
  sys.exit(main())
