"""Proves a pod before it is rented: compiles the real programs for it, and says what they need and move.

  python launch/aot.py --config=configs/deepseek_v3_671b.py --target=v5p:8x16x16 --json=v5p.json \\
    --config.mesh.data=32 --config.mesh.node=8 --config.mesh.local=8 --config.mesh.zero=3 \\
    --config.model.remat=block --config.model.dual_batch=True \\
    --config.batch.size=16384 --config.batch.start_size=4096 --config.batch.micro_size=4096

Targets are those of `dsv3_jax/pods.py`: v5p:8x16x16, tpu7x:8x8x16, v6e:16x16, h200:256x8, slices behind a
comma. The compiler is the chip maker's own; no chip is needed, only the extra [tpu] or [cuda]. With one of
them installed, start with JAX_PLATFORMS=cpu. The flags that a run gets count here too, where they are set:
`PLATFORM=gpu; . launch/environment.sh` before. `--programs` picks train, prefill and decode, `--rows` the
sequences of a device in the last two, `--options` compiler options (name=value, by commas).

A page per program: bytes per device against its memory; products of a device and the model's share of
them; what crosses links by kind and mesh axes, as written and as compiled, and how much of it has work
beside it; bounds on the time of a step. Exits with 1 when a program does not fit with a tenth to spare.

Assumptions of the times: dense matmul peak of the chip, even routing (no further rounds), the rows of
`dsv3_jax/codesign/hardware.py` for links at their achieved rate, one way; `local` on fast links as far as
they reach, all other axes of GPUs on the network; collectives one after another by ring algorithms.
"""

import dataclasses
import json
import pathlib
import time
from typing import Any

import jax
from absl import flags as absl_flags

from dsv3_jax import config, counts, flags, lowering, pods, runtime
from dsv3_jax.codesign import compute, hardware, hlo, traffic
from dsv3_jax.parallel import dispatch, plan, wire
from dsv3_jax.precision import recipe
from dsv3_jax.training import pipelined

_TARGET = absl_flags.DEFINE_string('target', '', 'the pod, like v5p:8x16x16 or h200:256x8')
_PROGRAMS = absl_flags.DEFINE_list('programs', ['train', 'prefill', 'decode'], 'which to compile')
_ROWS = absl_flags.DEFINE_integer('rows', 2, 'sequences of a device in prefill and decode')
_OPTIONS = absl_flags.DEFINE_list('options', [], 'compiler options, name=value')
_JSON = absl_flags.DEFINE_string('json', '', 'file for the same figures')
_SPARE = 0.1  # of the memory


@dataclasses.dataclass(frozen=True)
class Page:
  """What one program comes to on a device; bytes, FLOPs and seconds."""

  program: str
  target: str
  mesh: dict[str, int]
  compile_s: float
  memory: dict[str, int]
  capacity: float
  flops: float
  model_flops: float
  tokens: int
  rows: list[traffic.Row]
  compute_s: float
  memory_s: float
  links_s: float
  peak: float
  devices: int

  @property
  def used(self) -> int:
    return sum(self.memory.values())

  @property
  def fits(self) -> bool:
    return self.used <= (1 - _SPARE) * self.capacity

  @property
  def hidden(self) -> float:
    """Part of what is sent that has work beside it."""
    sent = sum(row.sent for row in self.rows)
    return sum(row.hidden for row in self.rows) / sent if sent else 1.0

  @property
  def step_s(self) -> dict[str, float]:
    """Bounds: links all hidden, as the schedule has them, none hidden."""
    work = max(self.compute_s, self.memory_s)
    open_s = (1 - self.hidden) * self.links_s
    scheduled = max(work, self.hidden * self.links_s) + open_s
    return {
      'all hidden': max(work, self.links_s),
      'as scheduled': scheduled,
      'none hidden': work + self.links_s,
    }

  def as_json(self) -> dict:
    return dataclasses.asdict(self) | {
      'used': self.used, 'fits': self.fits, 'hidden': self.hidden, 'step_s': self.step_s
    }  # fmt: skip

  def text(self) -> str:
    mesh = ' x '.join(f'{axis} {size}' for axis, size in self.mesh.items() if size > 1)
    lines = [f'---- {self.program} on {self.target}: {mesh}; compiled in {self.compile_s:.0f} s']
    lines += [f'  {name:<26}{size / 1e9:9.2f} GB' for name, size in self.memory.items()]
    left = 1 - self.used / self.capacity
    of = f'of {self.capacity / 1e9:.0f} GB; {left:.0%} to spare'
    lines += [f'  {"a device needs":<26}{self.used / 1e9:9.2f} GB {of}']
    share = self.model_flops / self.flops
    lines += [
      f'  a device multiplies {self.flops / 1e12:,.1f} TFLOP, {share:.0%} of them the model'
    ]
    lines += [
      '  kind      axes               written GB  compiled  ratio   sent GB  async  beside work  matmul'
    ]
    for row in self.rows:
      part = lambda x, row=row: x / row.sent if row.sent else 0.0
      lines.append(
        f'  {row.kind:<9} {" x ".join(row.axes):<18} {row.written / 1e9:10.3f} {row.compiled / 1e9:9.3f}'
        f' {row.ratio:6.3f} {row.sent / 1e9:9.3f}  {part(row.asynchronous):5.0%}  {part(row.hidden):11.0%}'
        f'  {part(row.beside_matmul):6.0%}  {", ".join(row.forms)}'
      )
    lines += [f'  {self.hidden:.0%} of what is sent is asynchronous with work beside it']
    lines += [
      f'  at peak: compute {self.compute_s:.3g} s, memory at least {self.memory_s:.3g} s, links {self.links_s:.3g} s'
    ]
    for name, seconds in self.step_s.items():
      rate = self.tokens / self.devices / seconds
      mfu = self.model_flops / seconds / self.peak
      lines += [
        f'  links {name:<13} {seconds:9.4g} s  {rate:9,.0f} tokens/s a device  MFU {mfu:.1%}'
      ]
    return '\n'.join(lines)


class _TooLargeError(Exception):
  """The compiler gave up a program for the memory that it needs; `memory`: of its arguments."""

  def __init__(self, told: str, memory: dict[str, int]) -> None:
    super().__init__(told)
    self.memory = memory


def main(c: config.Config, given: flags.Given) -> int:
  target, names = _TARGET.value, _PROGRAMS.value
  unknown = [name for name in names if name not in ('train', 'prefill', 'decode')]
  if unknown:
    raise config.ConfigError(f'--programs = {unknown[0]}: must be of train, prefill, decode')
  if c.model.dual_batch and _ROWS.value % 2 and set(names) & {'prefill', 'decode'}:
    right = 'even: model.dual_batch halves the rows of each device'
    raise config.ConfigError(f'--rows = {_ROWS.value}: must be {right}')
  options = dict(_option(text) for text in _OPTIONS.value)
  device_mesh = pods.make_mesh(c.mesh, target)
  pages = []
  for name in names:
    try:
      page = _page(c, name, device_mesh, target, options)
    except _TooLargeError as error:
      print(f'---- {name} on {target}: {error}\n{_advice(c, name, error.memory)}', flush=True)
      continue
    pages.append(page)
    print(page.text(), flush=True)
    if not page.fits:
      over = page.used - (1 - _SPARE) * page.capacity
      print(f'  does not fit with a tenth to spare: {over / 1e9:.1f} GB too much')
      print(_advice(c, name, page.memory), flush=True)
  if _JSON.value:
    told = {'config': given.file, 'overrides': given.overrides, 'options': options}
    told['programs'] = [page.as_json() for page in pages]
    pathlib.Path(_JSON.value).write_text(json.dumps(told, indent=2) + '\n', encoding='utf-8')
  return 0 if len(pages) == len(names) and all(page.fits for page in pages) else 1


def _option(text: str) -> tuple[str, str]:
  name, equals, value = text.partition('=')
  if not equals:
    raise config.ConfigError(f'--options = {text}: must be name=value')
  return name, value


def _page(c, name, device_mesh, target, options) -> Page:
  lower = {
    'train': lambda: lowering.train(c, device_mesh),
    'prefill': lambda: lowering.prefill(c, device_mesh, _ROWS.value),
    'decode': lambda: lowering.decode(c, device_mesh, _ROWS.value),
  }[name]
  program, sizes = lower(), dict(device_mesh.shape)
  written = lowering.read(program, sizes)
  moved = written.moved
  exact = _exchange(c, program, name)
  if exact:  # remat drops parts of what is written: the plan says what is left
    moved = [each for each in moved if each.kind != 'exchange' or each.axes == ('pipe',)] + exact
  began = time.monotonic()
  try:
    compiled = pods.compile(program.traced.lower(), target, **options)
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    raise _TooLargeError(str(error).splitlines()[0], program.memory) from None
  seconds = time.monotonic() - began
  stats, text = compiled.memory_analysis(), compiled.as_text()
  found, over = hlo.collectives(text, sizes), hlo.overlaps(text)
  rows = traffic.table(moved, found, over, sizes, program.outermost)
  memory = program.memory | {
    'activations and temporaries': _temporaries(stats, pods.parse(target)),
    'program': stats.generated_code_size_in_bytes,
  }
  # Results that do not take the place of an argument.
  memory['results'] = stats.output_size_in_bytes - stats.alias_size_in_bytes
  machine, devices = _machine(target), device_mesh.size
  tokens = program.tokens / devices
  flops = written.flops + _expert_flops(c, name, tokens) + _context_flops(c, name, tokens)
  moved_bytes = stats.argument_size_in_bytes + stats.output_size_in_bytes
  return Page(
    program=name,
    target=target,
    mesh=sizes,
    compile_s=seconds,
    memory=memory,
    capacity=machine.memory,
    flops=flops,
    model_flops=_model_flops(c, name, program.tokens, _ROWS.value * devices) / devices,
    tokens=program.tokens,
    rows=rows,
    compute_s=flops / machine.peak,
    memory_s=moved_bytes / machine.memory_bandwidth,
    links_s=sum(row.sent / machine.link(row.axes, sizes) for row in rows if row.sent),
    peak=machine.peak,
    devices=devices,
  )


def _temporaries(stats: Any, pod: pods.Target) -> int:
  """Bytes that a program allocates for itself; on TPUs, no more than so many.

  libtpu's `temp_size_in_bytes` counts what lies idle between buffers at the peak twice: inside the allocation,
  and once more. With u bytes in use there it is 2 allocated - u; `peak_memory_in_bytes` was above u in both
  programs whose logs were read. Of V3's train step on tpu7x, libtpu's log has 49.1 GB, this says 63.8, and
  temp_size_in_bytes 80.2.
  """
  if not pod.is_tpu:
    return stats.temp_size_in_bytes
  used = stats.peak_memory_in_bytes - stats.argument_size_in_bytes
  return (stats.temp_size_in_bytes + used) // 2


@dataclasses.dataclass(frozen=True)
class _Device:
  memory: float
  memory_bandwidth: float
  peak: float
  kind: hardware.Hardware
  per_host: int

  def link(self, axes: tuple[str, ...], sizes: dict[str, int]) -> float:
    """Bytes/s of a device, one way."""
    within = axes == ('local',) and sizes['local'] <= self.per_host
    return (self.kind.fast if self.kind.torus or within else self.kind.slow).achieved


def _machine(target: str) -> _Device:
  pod = pods.parse(target)
  if pod.name not in hardware.MACHINES:
    known = ', '.join(hardware.MACHINES)
    raise config.ConfigError(f'target = {target}: no figures of {pod.name} here; there are {known}')
  kind = hardware.get(pod.name)
  part = 2 if pod.name == 'tpu7x' else 1  # devices of a chip
  if part > 1:
    half = hardware.Links(kind.fast.nominal / part, kind.fast.achieved / part, kind.fast.name)
    kind = dataclasses.replace(kind, fast=half)
  chip = kind.chip
  per_host = pod.shape[1] if not pod.is_tpu else 0
  return _Device(chip.memory / part, chip.memory_bandwidth / part, chip.bf16 / part, kind, per_host)


def _model_flops(c: config.Config, name: str, tokens: int, sequences: int) -> float:
  """What the model asks for, whatever the program does: no padding, nothing computed again.

  A chunk of a prompt is taken from the middle of it, and the head runs behind its last token alone.
  """
  m, length = c.model, c.batch.seq_len
  if name == 'decode':
    return tokens * compute.decode_flops(m, length)
  training = counts.training_flops_per_token(m, length, mtp=name == 'train')
  if name == 'train':
    return tokens * training
  return tokens * training / 3 - (tokens - sequences) * 2 * counts.embedding_parameters(m)


def _context_flops(c: config.Config, name: str, tokens: float) -> float:
  """Of absorbed attention behind `batch.seq_len` tokens: a loop whose length the longest row decides."""
  return 0.0 if name == 'train' else tokens * compute.attention_flops(c.model) * c.batch.seq_len


def _expert_flops(c: config.Config, name: str, tokens: float) -> float:
  """Of routed experts under even routing; `remat='block'` multiplies forward twice."""
  layers = c.model.num_layers - c.model.num_dense_layers
  layers += c.model.mtp_depth if name == 'train' else 0
  if name == 'train' and c.mesh.pipe > 1:
    runs, layers = _ticks(c)
    tokens = runs * _device_tokens(c)
  passes = 1 if name != 'train' else 4 if c.model.remat == 'block' else 3
  return 2.0 * passes * tokens * c.model.moe.top_k * layers * counts.expert_parameters(c.model)


def _device_tokens(c: config.Config) -> int:
  """Of a micro-batch."""
  return c.batch.micro_size // (c.mesh.data * c.mesh.node * c.mesh.local) * c.batch.seq_len


def _ticks(c: config.Config) -> tuple[int, int]:
  """Forwards of a rank of a pipeline in a step, those that are masked too, and layers with experts in each."""
  s = pipelined.arrange(c)
  layers = sum(s.may_be_moe(place) for place in range(s.places))
  return s.stages + c.batch.size // c.batch.micro_size - 2, layers


def _exchange(c: config.Config, program: lowering.Program, name: str) -> list[traffic.Moved]:
  """What permutes of the train step hand on, by the plan; nothing for other forms and programs.

  Of a scanned layer remat sends tokens out again under 'block'; of an MTP module, whose output the
  backward reads once more, also back. A rank of a pipeline sends in every tick, masked or not.
  """
  form, _ = dispatch.choose(c.model.moe, c.mesh.node, c.mesh.local)
  if form not in ('two_hop', 'flat') or name != 'train':
    return []
  halves = 2 if c.model.dual_batch else 1
  tokens = _device_tokens(c) // halves
  p = plan.make(c.model.moe, form, tokens, c.mesh.node, c.mesh.local)
  dim, dtype = c.model.dim, recipe.compute_dtype(c.model.precision)
  there, back = p.bytes(dim, dtype), p.bytes(dim, dtype, backward=True)
  whole = p.row_bytes(dim, dtype)
  home = wire.row_bytes(p.combine, dim, dtype) / whole  # part of a row that goes back
  again = {'none': 0.0, 'latents': 0.0, 'block': 1 - home}[c.model.remat]
  further = {'none': 0.0, 'latents': home, 'block': 1.0}[c.model.remat]
  runs = program.outermost * halves
  scanned, mtp = c.model.num_layers - c.model.num_dense_layers, c.model.mtp_depth
  if c.mesh.pipe > 1:
    (runs, scanned), mtp = _ticks(c), 0
  found = []
  for axis in ('node', 'local') if form == 'two_hop' else ():
    size = scanned * (there[axis] * (1 + again) + back[axis])
    size += mtp * (there[axis] * (1 + further) + back[axis])
    found.append(traffic.Moved('exchange', (axis,), 2, runs * size, 'ppermute'))
  return found


def _advice(c: config.Config, program: str, memory: dict[str, int]) -> str:
  """What would help a program that does not fit, the nearest first; `memory`: bytes of its arguments."""
  helps = []
  if program == 'train':
    state = sum(memory.get(name, 0) for name in ('weights', 'optimizer', 'average'))
    if c.mesh.zero < 3 and c.mesh.pipe == 1:
      helps.append(f'mesh.zero=3 (state is {state / 1e9:.1f} GB a device)')
    if c.mesh.pipe > 1 and c.pipeline.weight_part == 'deferred':
      helps.append("pipeline.weight_part='at_once'")
    if c.model.remat != 'block':
      helps.append(f"model.remat='block' (it is {c.model.remat!r})")
    rows = c.batch.micro_size // (c.mesh.data * c.mesh.node * c.mesh.local)
    if rows > (2 if c.model.dual_batch else 1):
      helps.append(f'a smaller batch.micro_size ({rows} rows on a device)')
    if c.mesh.zero_permutes:
      helps.append('mesh.zero_permutes=0 (gathers under way at once take memory)')
    if c.model.moe.dispatch.capacity > 1:
      helps.append(f'model.moe.dispatch.capacity=1 (it is {c.model.moe.dispatch.capacity:g})')
    helps.append('more devices along mesh.data')
  else:
    helps = [
      'fewer --rows',
      'a shorter batch.seq_len',
      'more devices along mesh.node and mesh.local',
    ]
  return f'  would help: {"; ".join(helps)}'


if __name__ == '__main__':
  runtime.log_warnings_only()
  flags.run(main)
