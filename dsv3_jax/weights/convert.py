"""Released weights in and out, streamed: `python -m dsv3_jax.weights.convert import|export|inspect`.

  python -m dsv3_jax.weights.convert inspect HF_FOLDER
  python -m dsv3_jax.weights.convert import HF_FOLDER WORKDIR --dtype=bf16
  python -m dsv3_jax.weights.convert export WORKDIR HF_FOLDER --dtype=fp8 --shard_size=5GB

HF_FOLDER is a Hugging Face checkpoint of the DeepSeek-V3 or V2 family: config.json, safetensors shards,
index. WORKDIR is then what `generate`, `evaluate` and `train --config.run.init_from=WORKDIR` take, and any
training run's folder can be exported. The same command again goes on where a killed one stopped; what is
not finished is never taken for a checkpoint.
"""

import argparse
import re
import sys
from collections.abc import Sequence

import jax

from dsv3_jax import console, runtime
from dsv3_jax.config import ConfigError
from dsv3_jax.training.checkpoint import CheckpointError
from dsv3_jax.weights import exporting, importing, inspecting

_UNITS = {'': 1, 'KB': 10**3, 'MB': 10**6, 'GB': 10**9}


def main(arguments: Sequence[str] | None = None) -> int:
  """Exit code: 0; 1 where `inspect` finds faults; 2 after a line about each thing that cannot work."""
  runtime.log_warnings_only()
  return console.run(
    'convert',
    _parse,
    _run,
    arguments,
    file='source',
    told=(CheckpointError,),
    interrupted='interrupted; the same command goes on from here',
  )


def _run(args: argparse.Namespace) -> int | None:
  if args.command == 'inspect':
    return inspecting.run(args.source, print)
  if args.command == 'import':
    return importing.run(args.source, args.target, args.dtype, print)
  return exporting.run(
    args.source,
    args.target,
    dtype=args.dtype,
    shard_bytes=_bytes(args.shard_size),
    step=args.step,
    average=args.average,
    say=print,
  )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
  parser = console.Parser(
    'python -m dsv3_jax.weights.convert', description='Released weights in and out, streamed.'
  )
  commands = parser.add_subparsers(dest='command', required=True, metavar='import|export|inspect')
  dtypes = ('bf16', 'fp32', 'fp8')
  add = commands.add_parser('import', help='a checkpoint folder into a new WORKDIR').add_argument
  add('source', metavar='HF_FOLDER')
  add('target', metavar='WORKDIR')
  add(
    '--dtype', choices=dtypes, default='bf16', help='to keep weights in; fp8 keeps codes and scales'
  )
  add = commands.add_parser('export', help='a WORKDIR into a new checkpoint folder').add_argument
  add('source', metavar='WORKDIR', help='folder of an import or of a training run')
  add('target', metavar='HF_FOLDER')
  add('--dtype', choices=dtypes, help='of the tensors (as imported; bf16 for a training run)')
  add('--shard_size', default='5GB', help='largest file, in bytes, MB or GB (%(default)s)')
  add('--step', type=int, help='checkpoint of a training run to take (the newest)')
  add('--average', action='store_true', help='take the average of the weights')
  add = commands.add_parser('inspect', help='what a folder holds, and what is wrong').add_argument
  add('source', metavar='FOLDER', help='HF_FOLDER or WORKDIR')
  return parser.parse_args(arguments)


def _bytes(text: str) -> int:
  found = re.fullmatch(r'(\d{1,15}(?:\.\d+)?) ?(|KB|MB|GB)', text.upper())
  size = int(float(found[1]) * _UNITS[found[2]]) if found else 0
  if not size:
    raise ConfigError(f'--shard_size={text}: must be a size such as 5GB, 500MB or 1000000')
  return size


if __name__ == '__main__':
  jax.config.update('jax_platforms', 'cpu')  # host's work: accelerators are left to others
  sys.exit(main())
