"""From hardware to model: `python -m dsv3_jax.codesign report --config=configs/deepseek_v3_671b.py --hardware=h800`.

  python -m dsv3_jax.codesign report --config=configs/deepseek_v3_671b.py --hardware=h800 --out=report.html
  python -m dsv3_jax.codesign report --config=CONFIG --config.mesh.data=16 --trace=trace.npz --activations=activations.npz

Every table of arXiv 2505.09343 recomputed from a config of ours and a machine, beside what was printed:
in the terminal, and as a page and as JSON beside it.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

import rich.console
from absl import flags as absl_flags

from dsv3_jax import console, flags
from dsv3_jax.codesign import branches, hardware, report
from dsv3_jax.config import ConfigError
from dsv3_jax.parallel import trace


def main(arguments: Sequence[str] | None = None) -> int:
  """Exit code: 0, or 2 after one line about what cannot work."""
  told = (ValueError, absl_flags.Error)
  return console.run('codesign', _parse, _run, arguments, file='out', told=told)


def _run(args: argparse.Namespace) -> None:
  machine = hardware.get(args.hardware)
  recorded = trace.load(args.trace) if args.trace else None
  activations = branches.load(args.activations) if args.activations else None
  sections = report.make(args.config, machine, recorded, activations)
  about = {'config': args.given.name, 'hardware': machine.name}
  if recorded:
    about['routing'] = args.trace
  if activations:
    about['activations'] = args.activations
  page = pathlib.Path(args.out)
  page.write_text(report.to_html(sections, about), encoding='utf-8')
  values = page.with_suffix('.json')
  values.write_text(report.to_json(sections, about), encoding='utf-8')
  report.show(sections, rich.console.Console())
  missed = report.misses(sections)
  for title, row in missed:
    print(f'{title}: {row.label} is {row.text}, printed {row.published}: {row.note}')
  print(f'{page}, {values}')


# ---- arguments -----------------------------------------------------------------------------------


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
  parser = console.Parser('python -m dsv3_jax.codesign', description=__doc__.split('\n')[0])
  commands = parser.add_subparsers(dest='command', required=True)
  add = commands.add_parser('report', help='all sections, as a page').add_argument
  add('--config', required=True, metavar='FILE', help='its keys are flags: --config.mesh.node=8')
  add('--hardware', default='h800', help=f'{", ".join(hardware.MACHINES)} (%(default)s)')
  add('--trace', metavar='FILE', help='a recorded routing (made up)')
  add('--activations', metavar='FILE', help='recorded activations, for LogFMT (made up)')
  add('--out', default='codesign.html', help='the page; JSON goes beside it (%(default)s)')
  args, rest = parser.parse_known_args(arguments)
  wrong = [arg for arg in rest if not arg.startswith('--config.')]
  if wrong:
    raise ConfigError(f'{wrong[0]}: not an argument; --help shows what there is')
  argv = ['codesign', f'--config={args.config}', *rest]
  values = absl_flags.FlagValues()
  flags.define(argv, values)
  args.config, args.given = flags.parse(argv, values)
  out = pathlib.Path(args.out)
  if out.suffix != '.html' or out.is_dir() or not out.absolute().parent.is_dir():
    raise ConfigError(
      f'--out={args.out}: must be a file that ends in .html, in a folder that exists'
    )
  return args


if __name__ == '__main__':
  sys.exit(main())
