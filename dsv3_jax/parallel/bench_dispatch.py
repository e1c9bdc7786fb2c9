"""Every way to the experts under every skew of the routing: time, bytes and rounds, side by side.

  python -m dsv3_jax.parallel.bench_dispatch --json=bench_dispatch.json
  python -m dsv3_jax.parallel.bench_dispatch --skews=trace.npz:3 --experts=256 --forms=two_hop,ragged

A skew is one of `skews.py`, or a layer of a recorded trace (`python -m dsv3_jax.trace`; without a number
the layer with the fullest expert), whose first tokens lie on the first device, and so on. What is timed
is dispatch, experts and combine of one layer; with --backward also the gradients of tokens, router
weights and experts. Emulates devices on CPU if there are too few: all of them share the machine's cores,
so what experts compute shows, links cost next to nothing, and waiting for the fullest device does not
show at all.

- A step runs every form once, in turn, each step in another order: noise hits all alike. Only ratios
  within one run mean anything on a shared machine.
- Before a form is timed under a skew its output, and with --backward every gradient, is held against
  every expert on every token of plain, unsent rows, in FP32. What is further off than its wire format
  explains gets no time, and the program ends with 1.
- `sent` is what one device sends along an axis forward, padding and all rounds included; `needed` what
  its rows need without padding, mean over devices. Backward, in the JSON: further rounds are replayed.
"""

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dsv3_jax import config, console, mesh, runtime
from dsv3_jax.config import ConfigError
from dsv3_jax.parallel import plan, skews, trace
from dsv3_jax.parallel.bench_layer import Inputs, error_of, make_reference, programs_of
from dsv3_jax.precision import recipe

FORMS = ('two_hop', 'flat', 'allgather', 'ragged', 'dense')
# What the formats of the way back and the dtype cost, as the error of the worst row over that row.
_LIMIT = {'plain': 0.0, 'fp32': 0.005, 'bf16': 0.03, 'logfmt10': 0.03, 'logfmt8': 0.06}
_FLAGS = {
  'model.dim': '--dim', 'model.moe.num_experts': '--experts', 'model.moe.top_k': '--top_k',
  'model.moe.num_groups': '--groups', 'model.moe.top_groups': '--top_groups',
  'model.moe.expert_dim': '--expert_dim', 'model.moe.dispatch.form': '--forms',
  'model.moe.dispatch.payload': '--payload', 'model.moe.dispatch.combine': '--combine',
  'model.moe.dispatch.capacity': '--capacity', 'model.precision': '--precision',
  'mesh.node': '--nodes', 'mesh.local': '--locals',
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
  """Exit code: 0; 1 when a form computed something wrong; 2 after one line about what cannot work."""
  told = (trace.TraceError,)
  return console.run('bench_dispatch', _parse, _run, arguments, file='json', told=told)


def _run(args: argparse.Namespace) -> int:
  runtime.keep_freed_memory()
  figures = measure(args)
  print(table(figures))
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(figures, indent=2) + '\n', encoding='utf-8')
  wrong = [
    f'{form} under {skew}'
    for skew, of in figures['skews'].items()
    for form, f in of['forms'].items()
    if f['wrong']
  ]
  if wrong:
    print(f'bench_dispatch: WRONG RESULTS, not timed: {", ".join(wrong)}', file=sys.stderr)
  return 1 if wrong else 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
  """All figures, by skew and form, with the sizes and the machine."""
  models = {form: _model(args, form) for form in args.forms}
  node, local = args.nodes, args.locals
  device_mesh = _mesh(node, local)
  if 'ragged' in args.forms and device_mesh.devices.flat[0].platform == 'cpu':
    raise ConfigError("--forms = 'ragged': XLA has no ragged all-to-all on CPU; leave it out")
  of_skew = {name: _choices(name, models[args.forms[0]].moe, args) for name in args.skews}
  inputs = Inputs(args, device_mesh)
  programs = {form: programs_of(m, device_mesh, args.backward) for form, m in models.items()}
  reference = make_reference(args, inputs, device_mesh.devices.flat[0])
  found = {}
  for name, ids_nTK in of_skew.items():
    given = inputs.put(ids_nTK)
    expected = reference(ids_nTK)
    forms = {}
    for form, m in models.items():
      errors = {}
      for program in programs[form]:
        out, rounds = program(*given)
        for k, result in out.items():
          errors[k] = float(np.maximum(errors.get(k, 0.0), error_of(k, result, expected[k])))
      forms[form] = _sent(m, form, ids_nTK, args, int(rounds)) | {'errors': errors}
      # Not "is larger": a NaN is wrong, too.
      forms[form]['wrong'] = [k for k, e in forms[form]['errors'].items() if not e <= _limit(args)]
    right = {form: programs[form] for form in forms if not forms[form]['wrong']}
    for form, seconds in _times(right, given, args.steps).items():
      forms[form]['seconds'] = seconds
    told = skews.describe(ids_nTK, args.experts, node, local)
    found[name] = told | {'forms': forms}
  sizes = {k: v for k, v in vars(args).items() if k not in ('skews', 'forms', 'json')}
  return {'skews': found, 'sizes': sizes} | _machine(device_mesh)


# ---- figures -------------------------------------------------------------------------------------


def _limit(args: argparse.Namespace) -> float:
  return max(_LIMIT[args.combine], _LIMIT[args.precision])


def _sent(
  m: config.Model, form: str, ids_nTK: np.ndarray, args: argparse.Namespace, rounds: int
) -> dict[str, Any]:
  """Rounds, and bytes by axis."""
  sizes = plan.make(m.moe, form, args.tokens, args.nodes, args.locals)
  dtype = recipe.compute_dtype(m.precision)
  rows = skews.useful_rows(form, ids_nTK, args.experts, args.nodes, args.locals)
  figures = {'rounds': rounds}
  for direction in ('forward', 'backward'):
    back = direction == 'backward'
    each = sizes.row_bytes(m.dim, dtype, backward=back)
    needed = {axis: n * each for axis, n in rows.items()}
    once = {axis: rounds * n for axis, n in sizes.bytes(m.dim, dtype, backward=back).items()}
    if form == 'ragged':  # which pads nothing
      once = needed
    elif back:
      there = sizes.bytes(m.dim, dtype)
      once = {axis: n + (rounds - 1) * there[axis] for axis, n in once.items()}
    figures |= {f'{direction}_bytes': once, f'{direction}_bytes_needed': needed}
  return figures


def _times(
  programs: dict[str, list[Callable]], given: tuple[Any, ...], steps: int
) -> dict[str, dict[str, dict[str, float]]]:
  """Median and best of each form's programs, in seconds."""
  runs = {(form, i): [] for form in programs for i in range(len(programs[form]))}
  order = list(runs)
  for step in range(-1, steps):  # one to warm up
    first = step % max(len(order), 1)
    for form, i in order[first:] + order[:first]:
      start = time.perf_counter()
      jax.block_until_ready(programs[form][i](*given))
      if step >= 0:
        runs[form, i].append(time.perf_counter() - start)
  names = ('forward', 'forward and backward')
  told = {form: {} for form in programs}
  for (form, i), seconds in runs.items():
    told[form][names[i]] = {'median': statistics.median(seconds), 'best': min(seconds)}
  return told


def _machine(device_mesh: jax.sharding.Mesh) -> dict[str, Any]:
  device, cores = device_mesh.devices.flat[0], len(os.sched_getaffinity(0))
  name = f'{device_mesh.size} x {device.device_kind}'
  if device.platform == 'cpu':
    name += f', emulated on {platform.processor() or platform.machine()}, {cores} cores'
  versions = {p: importlib.metadata.version(p) for p in ('jax', 'jaxlib', 'numpy')}
  return {
    'device': name,
    'versions': versions | {'python': platform.python_version()},
    'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    'load_average': os.getloadavg()[0],
  }


def table(figures: dict[str, Any]) -> str:
  """A line for each form under each skew; ratios are to two_hop, or to the first form without it."""
  s = figures['sizes']
  lines = [
    f'{figures["device"]}: {s["nodes"]} nodes x {s["locals"]}, {s["tokens"]} tokens a device, dim '
    f'{s["dim"]}, {s["experts"]} experts of {s["expert_dim"]}, {s["top_k"]} a token in '
    f'{s["top_groups"]} of {s["groups"]} groups, {s["precision"]}, {s["payload"]} out, '
    f'{s["combine"]} back, capacity {s["capacity"]:g}',
    '',
  ]
  forms = list(next(iter(figures['skews'].values()))['forms'])
  base = 'two_hop' if 'two_hop' in forms else forms[0]
  titles = ['forward']
  titles += ['forward and backward'] if s['backward'] else []
  head = f'{"":11}{"rounds":>6}{"sent MB, node":>15}{"needed":>8}{"local":>9}{"needed":>8}'
  for title in titles:
    head += f'   {f"{title}, ms":>24}{"best":>9}{f"x {base}":>12}{"best":>7}'
  lines.append(head)
  for skew, of in figures['skews'].items():
    loads = ', '.join(f'{part} {of[f"{part}_load"]:.2f}' for part in ('expert', 'device', 'node'))
    per = f'{of["nodes_per_token"]:.2f} nodes and {of["devices_per_token"]:.2f} devices a token'
    lines.append(f'{skew}: load over mean, fullest {loads}; {per}')
    over = of['forms'][base].get('seconds', {})
    for form, f in of['forms'].items():
      line = f'  {form:<9}{f["rounds"]:>6}'
      for axis, width in (('node', 15), ('local', 9)):
        sent, needed = (f[f'forward_bytes{k}'][axis] / 1e6 for k in ('', '_needed'))
        line += f'{sent:>{width}.2f}{needed:>8.2f}'
      if f['wrong']:
        off = ', '.join(f'{name} by {f["errors"][name]:.2g}' for name in f['wrong'])
        line += f'   WRONG, not timed: {off}'
      else:
        for title in titles:
          t, b = f['seconds'][title], over.get(title)
          ratio = lambda k, t=t, b=b: f'{t[k] / b[k]:.2f}' if b else '-'
          line += f'   {1e3 * t["median"]:>24.1f}{1e3 * t["best"]:>9.1f}'
          line += f'{ratio("median"):>12}{ratio("best"):>7}'
      lines.append(line)
  return '\n'.join(lines)


# ---- flags ---------------------------------------------------------------------------------------


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
  parser = console.Parser(
    'python -m dsv3_jax.parallel.bench_dispatch', description=__doc__.split('\n')[0]
  )

  def add(name: str, default: Any, what: str) -> None:
    parser.add_argument(
      f'--{name}', type=type(default), default=default, help=f'{what} (%(default)s)'
    )

  add('nodes', 2, 'nodes')
  add('locals', 4, 'devices of each')
  add('tokens', 512, 'tokens of each device')
  add('dim', 512, 'numbers of a token')
  add('experts', 64, 'routed experts')
  add('top_k', 8, 'experts of a token')
  add('groups', 8, 'groups of experts')
  add('top_groups', 4, 'groups of a token, at most')
  add('expert_dim', 128, 'hidden width of an expert')
  add('forms', 'two_hop,flat,allgather', f'of {",".join(FORMS)}')
  add('skews', ','.join(skews.NAMES), 'of these, or traces: FILE.npz, FILE.npz:LAYER')
  add('precision', 'bf16', 'bf16 or fp32')
  add('payload', config.Dispatch.payload, 'wire format out')
  add('combine', config.Dispatch.combine, 'wire format back')
  add('capacity', config.Dispatch.capacity, 'buffers over what even routing needs')
  add('steps', 5, 'timed steps')
  parser.add_argument('--backward', action=argparse.BooleanOptionalAction, default=True)
  parser.add_argument('--json', metavar='OUT', help='file for the figures')
  args = parser.parse_args(arguments)
  for name in ('tokens', 'steps', 'nodes', 'locals'):
    if getattr(args, name) < 1:
      raise ConfigError(f'--{name} = {getattr(args, name)}: must be positive')
  if args.nodes * args.locals == 1:
    raise ConfigError('--nodes = 1, --locals = 1: must be two devices or more, or nothing moves')
  args.forms, args.skews = args.forms.split(','), args.skews.split(',')
  if args.json and not pathlib.Path(args.json).parent.is_dir():
    raise ConfigError(f'--json={args.json}: there is no folder {pathlib.Path(args.json).parent}')
  if args.precision not in ('bf16', 'fp32'):
    raise ConfigError(f"--precision = {args.precision!r}: must be 'bf16' or 'fp32'")
  for form in args.forms:
    if form not in FORMS:
      raise ConfigError(f'--forms: {form!r} must be one of {", ".join(FORMS)}')
  return args


def _model(args: argparse.Namespace, form: str) -> config.Model:
  """The config's model, by the config's own rules; its messages name flags."""
  d, n = config.default(), args.nodes * args.locals
  d.model.update(dim=args.dim, precision=args.precision)
  d.model.moe.update(num_experts=args.experts, top_k=args.top_k, expert_dim=args.expert_dim)
  d.model.moe.update(num_groups=args.groups, top_groups=args.top_groups)
  wire_formats = {'payload': args.payload, 'combine': args.combine}
  # A training run asks two_hop for fewer groups than nodes; here it may show what it costs without.
  checked = 'auto' if form == 'two_hop' else form
  d.model.moe.dispatch.update(form=checked, capacity=args.capacity, **wire_formats)
  d.batch.update(size=n, start_size=n, micro_size=n)
  d.mesh.update(node=args.nodes, local=args.locals)
  try:
    m = config.freeze(d).model
  except ConfigError as error:
    told = '; '.join(str(error).splitlines())
    for key, flag in _FLAGS.items():
      told = told.replace(key, flag)
    raise ConfigError(told) from None
  as_asked = dataclasses.replace(m.moe.dispatch, form=form)
  return dataclasses.replace(m, moe=dataclasses.replace(m.moe, dispatch=as_asked))


def _mesh(node: int, local: int) -> jax.sharding.Mesh:
  """The first devices; emulated ones on CPU if there are too few of them."""
  with contextlib.suppress(RuntimeError):  # JAX runs already, with as many as it has
    jax.config.update('jax_num_cpu_devices', node * local)
  devices = jax.devices()
  if len(devices) < node * local:
    devices = jax.devices('cpu')
  return mesh.make_mesh(config.Mesh(node=node, local=local), devices)


def _choices(name: str, c: config.Moe, args: argparse.Namespace) -> np.ndarray:
  """Experts of every token under a skew or in a trace, int32 [devices, tokens, K]."""
  devices = args.nodes * args.locals
  if name in skews.NAMES:
    return skews.make(name, c, devices, args.tokens)
  path, _, layer = name.partition('.npz')
  if path == name:
    known = ', '.join(skews.NAMES)
    raise ConfigError(f'--skews: {name!r} must be one of {known}, or a trace that ends in .npz')
  found = trace.load(f'{path}.npz')
  for flag, there in (('experts', found.num_experts), ('top_k', found.top_k)):
    if getattr(args, flag) != there:
      raise ConfigError(f'--{flag} = {getattr(args, flag)}: must be {there}, as in {path}.npz')
  if found.tokens < devices * args.tokens:
    most = found.tokens // devices
    raise ConfigError(f'--tokens = {args.tokens}: must be at most {most}: {path}.npz has no more')
  at = int(found.load_Y.argmax())
  if layer:
    at = int(layer[1:]) if layer[1:].isdigit() else -1
    if layer[0] != ':' or not 0 <= at < found.layers:
      raise ConfigError(f'--skews: {name!r} must end in a layer from :0 to :{found.layers - 1}')
  ids_SK = found.ids_YTK[at, : devices * args.tokens]
  return ids_SK.astype(np.int32).reshape(devices, args.tokens, -1)


if __name__ == '__main__':
  sys.exit(main())
