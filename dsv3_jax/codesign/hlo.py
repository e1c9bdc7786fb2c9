"""Compiled programs read as text: what they send, over which mesh axes, and what computes meanwhile.

The text is `compiled.as_text()`: HLO after all passes, on CPU, TPU or GPU. `collectives` and
`bytes_by_axis` read what crosses links, `overlaps` what the scheduler put between the start and the
done of each transfer. All figures are of one device and one run of the instruction: loops around it are
named, not multiplied.

How backends write what is one collective in the program:
  TPU   start and done; or, where it is fused with compute, three fusions of one chain: a start (flag -1),
        any number of steps, a done. Between slices of a pod: send and recv over the slow network, in a
        program whose device ids count within a slice.
  GPU   always start and done: "is_sync" in the start's config says whether they run as one. Permutes
        with the same pairs are merged into one of several operands (compiler option
        xla_gpu_collective_permute_combine_threshold_bytes).
  CPU   one instruction; nothing overlaps.

A start may also be a generic `async-start` whose called computation holds the collective. jax 0.12
writes replica groups by the axes of the mesh, earlier versions as lists or as a transposed iota.
A libtpu newer than its jax fails in `as_text()` on asynchronous collectives: install them as a pair.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping

from dsv3_jax.codesign.replica_groups import Places

KINDS = (
  'collective-permute',
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'ragged-all-to-all',
  'send',
  'recv',
)


@dataclasses.dataclass(frozen=True)
class Loop:
  """A while loop; `trips` is None where the compiler does not know."""

  name: str
  trips: int | None


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective. `share[axis]`: the part of all devices that send to another index of the axis."""

  name: str
  kind: str
  origin: (
    str  # the program's word for it, where it is known: 'ppermute', 'all_gather', 'psum_invariant'
  )
  scope: str  # functions, transformations and named scopes around it in the program
  operand_bytes: int  # of one device; for a ragged all-to-all its whole buffer, filled or not
  result_bytes: int
  members: int  # devices of one group; of a permute 2
  fills: bool  # each device brings a slice of its own in a buffer: an all-reduce that gathers
  joins: bool  # a buffer of several: sums that were merged, on GPU, and have lost their names
  share: Mapping[str, float]
  computation: str
  loops: tuple[Loop, ...]  # around it, from the outside in
  asynchronous: bool

  @property
  def axes(self) -> tuple[str, ...]:
    """Mesh axes over which it moves data, in the order of the mesh."""
    return tuple(self.share)


@dataclasses.dataclass(frozen=True)
class Overlap:
  """What is scheduled strictly between start and done of a collective: nothing if it is synchronous.

  A loop, branch or call counts once, as a matmul if one stands anywhere inside. Loops of matmuls may run
  any number of times, none included. A kernel counts as a matmul if its name or target says
  gemm, matmul, wgrad or dot_general: its inside is not text. Schedulers cover a transfer with the first work that
  they take for long enough, a long sum too: no matmul beside it does not say that nothing is.
  """

  name: str
  kind: str
  computation: str
  asynchronous: bool
  matmuls: int
  others: int  # fusions, kernels, loops and calls without a matmul
  collectives: int  # started or run meanwhile


def collectives(text: str, mesh_shape: Mapping[str, int]) -> list[Collective]:
  """All collectives of a program, in the order of the text.

  `mesh_shape`: sizes by axis in device order (`dict(mesh.shape)`). Slices of a TPU pod are the outermost.
  Raises ValueError when the program is not one for that many devices, or on replica groups unknown here.
  """
  module = _Module(text)
  places = Places(mesh_shape, module.partitions, module.sliced)
  return [
    Collective(
      name=found.start.name,
      kind=found.kind,
      origin=found.origin,
      scope=found.scope,
      operand_bytes=module.operand_bytes(found),
      result_bytes=module.result_bytes(found),
      members=places.members(found.kind, found.inner.attributes),
      fills=module.fills(found),
      joins=module.joins(found),
      share=places.share(found.kind, found.inner.attributes),
      computation=found.computation,
      loops=module.loops(found.computation),
      asynchronous=found.asynchronous,
    )
    for found in module.collectives()
  ]


def bytes_by_axis(found: Iterable[Collective]) -> dict[str, float]:
  """Bytes that a device sends by permutes to other indices of each axis, as a mean over devices.

  A permute over two axes counts for both, by the devices that cross each: `node` is what crosses
  between nodes.
  """
  total: dict[str, float] = {}
  for each in found:
    if each.kind == 'collective-permute':
      for axis, share in each.share.items():
        total[axis] = total.get(axis, 0) + share * each.operand_bytes
  return total


def overlaps(text: str) -> list[Overlap]:
  """For every collective of a scheduled program, what may run while its bytes travel.

  Raises ValueError when the program is not scheduled: its order would mean nothing.
  """
  if 'is_scheduled=true' not in text.partition('\n')[0]:
    raise ValueError('the program is not scheduled: give the text of a compiled one')
  module = _Module(text)
  starts = {id(found.start) for found in module.collectives()}
  return [_overlap(module, found, starts) for found in module.collectives()]


def _overlap(module: '_Module', found: '_Found', starts: set[int]) -> Overlap:
  counts = {'collectives': 0, 'matmuls': 0, 'others': 0}
  for instruction in module.between(found):
    if id(instruction) in starts:
      counts['collectives'] += 1
    elif module.is_matmul(instruction):
      counts['matmuls'] += 1
    elif instruction.opcode in _WORK:
      counts['others'] += 1
  return Overlap(found.start.name, found.kind, found.computation, found.asynchronous, **counts)


# ---- text to instructions ------------------------------------------------------------------------

_COMPUTATION = re.compile(r'(ENTRY )?%?([\w.\-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'\s+(?:ROOT )?%?([\w.\-]+) = ')
_OPCODE = re.compile(r'\s*([a-z][\w\-]*)\(')
_CALLED = re.compile(r'\b(?:calls|to_apply|body|condition|\w+_computation)=%?([\w.\-]+)')
_BRANCHES = re.compile(r'\b(?:branch_computations|called_computations)=\{([^}]*)\}')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_KERNEL = re.compile(
  r'(?:custom_call_target|op_name)="[^"]*(?:gemm|matmul|wgrad|dot_general)', re.IGNORECASE
)
_CHAIN = re.compile(r'chain_id="(\d+)"')
_STEP = re.compile(r'"async_collective_fusion_config":\{"flag_start":"(-?\d+)"')
_ORIGIN = re.compile(r'op_name="(?:([^"]*)/)?([^"/]*)"')
_VALUE = re.compile(r'constant\((\d+)\)')
_INDEX = re.compile(r'\bindex=(\d+)')
_SHAPE = re.compile(r'\b([a-z]\w*)\[([\d,]*)\]')
_WORK = ('fusion', 'custom-call', 'while', 'conditional', 'call', 'async-start')
_MATMULS = ('dot', 'convolution', 'ragged-dot', 'scaled-dot')


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  attributes: str

  @property
  def called(self) -> tuple[str, ...]:
    branches = [re.findall(r'[\w.\-]+', names) for names in _BRANCHES.findall(self.attributes)]
    return (*_CALLED.findall(self.attributes), *itertools.chain(*branches))


@dataclasses.dataclass(frozen=True)
class _Found:
  """A collective: the instruction that starts it, and the one that says where it goes."""

  kind: str
  computation: str
  start: _Instruction
  inner: _Instruction
  asynchronous: bool

  @property
  def origin(self) -> str:
    return self._names[1]

  @property
  def scope(self) -> str:
    return self._names[0]

  @property
  def _names(self) -> tuple[str, str]:
    names = _ORIGIN.search(self.inner.attributes) or _ORIGIN.search(self.start.attributes)
    return (names[1] or '', names[2]) if names else ('', '')


class _Module:
  """Computations as lists of instructions, in the order of the text, and who calls them."""

  def __init__(self, text: str) -> None:
    header = text.partition('\n')[0]
    partitions = re.search(r'num_partitions=(\d+)', header)
    self.partitions = int(partitions[1]) if partitions else 1
    self.sliced = '_xla_megascale_' in text
    self.computations = _computations(text)
    self.callers: dict[str, tuple[str, _Instruction]] = {}
    for name, instructions in self.computations.items():
      for instruction in instructions:
        for called in instruction.called:
          self.callers.setdefault(called, (name, instruction))
    self._matmul: dict[str, bool] = {}
    self._collectives: list[_Found] | None = None

  def collectives(self) -> list[_Found]:
    if self._collectives is None:
      self._collectives = [
        found
        for name, instructions in self.computations.items()
        for found in (self._collective(name, instruction) for instruction in instructions)
        if found
      ]
    return self._collectives

  def _collective(self, computation: str, start: _Instruction) -> _Found | None:
    kind = start.opcode.removesuffix('-start')
    if kind in KINDS:
      caller = self.callers.get(computation, (None, None))[1]
      # What fusions and async-starts hold is found with those.
      if caller is not None and caller.opcode in ('fusion', 'async-start'):
        return None
      asynchronous = kind != start.opcode or kind in ('send', 'recv')
      asynchronous &= '"is_sync":true' not in start.attributes
      return _Found(kind, computation, start, start, asynchronous)
    if start.opcode not in ('fusion', 'async-start'):
      return None
    for inner in self._inside(start):
      if inner.opcode in KINDS:
        if start.opcode == 'fusion' and 'calls=%all-reduce-scatter' in start.attributes:
          return _Found('reduce-scatter', computation, start, inner, False)
        step = _STEP.search(inner.attributes)
        if step and step[1] != '-1':
          return None  # a later part of a chain
        asynchronous = bool(step) or start.opcode == 'async-start'
        asynchronous &= '"is_sync":true' not in start.attributes
        return _Found(inner.opcode, computation, start, inner, asynchronous)
    return None

  def _inside(self, instruction: _Instruction) -> list[_Instruction]:
    return [each for name in instruction.called for each in self.computations.get(name, [])]

  def operand_bytes(self, found: _Found) -> int:
    shapes = {each.name: each.shape for each in self.computations[found.computation]}
    if found.start.opcode == 'fusion':
      shapes = {each.name: each.shape for each in self._inside(found.start)}
    operands = found.inner.operands if found.start.opcode == 'fusion' else found.start.operands
    # Behind the data of a ragged all-to-all come the output buffer, offsets and sizes.
    operands = operands[:1] if found.kind == 'ragged-all-to-all' else operands
    return sum(shape_bytes(shapes[name]) for name in operands)

  def result_bytes(self, found: _Found) -> int:
    if found.kind == 'collective-permute':
      return self.operand_bytes(found)
    size = shape_bytes(found.inner.shape)
    # The start of a gather has its operands beside its results.
    return size - self.operand_bytes(found) * (found.inner.opcode == 'all-gather-start')

  def fills(self, found: _Found) -> bool:
    return any(each.opcode == 'dynamic-update-slice' for each in self._makers(found))

  def joins(self, found: _Found) -> bool:
    fusions = [each for each in self._makers(found) if each.opcode == 'fusion']
    return any(self._inside(each)[-1].opcode == 'concatenate' for each in fusions)

  def _makers(self, found: _Found) -> list[_Instruction]:
    """Of its operands."""
    made = {each.name: each for each in self.computations[found.computation]}
    return [made[name] for name in found.start.operands if name in made]

  def loops(self, computation: str) -> tuple[Loop, ...]:
    loops: list[Loop] = []
    while computation in self.callers:
      computation, caller = self.callers[computation]
      if caller.opcode == 'while':
        loops.insert(0, Loop(caller.name, self._trips(caller)))
    return tuple(loops)

  def _trips(self, loop: _Instruction) -> int | None:
    """As the compiler tells them. TPU's does not: there, a counter that goes up by one to a constant."""
    if trips := _TRIPS.search(loop.attributes):
      return int(trips[1])
    parts = re.search(r'condition=%?([\w.\-]+), body=%?([\w.\-]+)', loop.attributes)
    condition, body = (
      self.computations.get(name, []) for name in (parts.groups() if parts else ('', ''))
    )
    if not condition or not body or body[-1].opcode != 'tuple':
      return None
    within = lambda instructions, name: next((i for i in instructions if i.name == name), None)
    root = condition[-1]
    if root.opcode != 'compare' or 'direction=LT' not in root.attributes:
      return None
    counter, limit = (within(condition, name) for name in root.operands)
    index = _INDEX.search(counter.attributes) if counter else None
    limit = _VALUE.match(limit.attributes) if limit else None
    if not index or not limit:
      return None
    step = within(body, body[-1].operands[int(index[1])])
    added = [within(body, name) for name in step.operands] if step and step.opcode == 'add' else []
    if not any(each and each.attributes.startswith('constant(1)') for each in added):
      return None
    return int(limit[1])

  def is_matmul(self, instruction: _Instruction) -> bool:
    if instruction.opcode in _MATMULS:
      return True
    if instruction.opcode == 'custom-call' and _KERNEL.search(instruction.attributes):
      return True
    return any(self._holds_matmul(name) for name in instruction.called)

  def _holds_matmul(self, computation: str) -> bool:
    if computation not in self._matmul:
      instructions = self.computations.get(computation, [])
      self._matmul[computation] = any(self.is_matmul(each) for each in instructions)
    return self._matmul[computation]

  def between(self, found: _Found) -> list[_Instruction]:
    if not found.asynchronous:
      return []
    instructions = self.computations[found.computation]
    begin = next(i for i, each in enumerate(instructions) if each is found.start)
    names = {found.start.name}  # the start, and the updates that hand it on
    chain = _CHAIN.findall(found.inner.attributes)
    for end, each in enumerate(instructions[begin + 1 :], begin + 1):
      if each.opcode.endswith('-update') and names & set(each.operands):
        names.add(each.name)
      if each.opcode.endswith('-done') and names & set(each.operands):
        return instructions[begin + 1 : end]
      if found.start.opcode == 'fusion' and each.name.startswith('async-collective-done'):
        last = next((inner for inner in self._inside(each) if inner.opcode == found.kind), None)
        if last and _CHAIN.findall(last.attributes) == chain:
          return instructions[begin + 1 : end]
    raise ValueError(f'{found.start.name} in {found.computation} is started there and never done')


def _computations(text: str) -> dict[str, list[_Instruction]]:
  computations: dict[str, list[_Instruction]] = {}
  current: list[_Instruction] = []
  for line in text.splitlines():
    if line[:1] not in (' ', '}', ''):
      if head := _COMPUTATION.match(line):
        current = computations.setdefault(head[2], [])
    elif match := _INSTRUCTION.match(line):
      rest = line[match.end() :]
      end = _closing(rest, 0) if rest[0] == '(' else rest.index(' ')
      opcode = _OPCODE.match(rest, end)
      if opcode is None or opcode[1] in ('constant', 'parameter'):
        kind = opcode[1] if opcode else ''
        # Of constants the value, where it is short: the limit of a loop is one.
        value = rest[opcode.start() :].strip()[:40] if kind == 'constant' else ''
        current.append(_Instruction(match[1], rest[:end], kind, (), value))
        continue
      close = _closing(rest, opcode.end() - 1)
      operands = re.findall(r'%([\w.\-]+)', rest[opcode.end() : close])
      current.append(_Instruction(match[1], rest[:end], opcode[1], tuple(operands), rest[close:]))
  return computations


def _closing(text: str, start: int) -> int:
  """Index behind the parenthesis that closes the one at `start`."""
  depth = 0
  for match in re.compile(r'[()]').finditer(text, start):
    depth += 1 if match[0] == '(' else -1
    if depth == 0:
      return match.end()
  raise ValueError(f'no closing parenthesis in {text[start : start + 80]!r}')


def shape_bytes(shape: str) -> int:
  """Bytes of an array or of all arrays of a tuple, as HLO writes it: 'bf16[8,128]{1,0}' -> 2048."""
  return sum(
    math.ceil(math.prod(int(n) for n in dims.split(',') if n) * _bits(dtype) / 8)
    for dtype, dims in _SHAPE.findall(shape)
  )


def _bits(dtype: str) -> int:
  if dtype in ('pred', 'token', 'opaque'):
    return 8 if dtype == 'pred' else 0
  digits = re.match(r'[a-z]+(\d+)', dtype)
  if digits is None:
    raise ValueError(f'{dtype} is no element type that is known here')
  return int(digits[1])
