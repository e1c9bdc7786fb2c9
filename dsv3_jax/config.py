"""Configuration: frozen dataclasses whose defaults are the values of the DeepSeek-V3 report.

`default()` gives the same values as a mutable ml_collections ConfigDict, which `configs/*.py` edit
and flags override; `freeze(config_dict)` turns it back, once, into a `Config` and refuses what
cannot work (unknown keys, wrong types, sizes that do not divide) before anything is compiled or
written. Below that line nobody sees a ConfigDict: mutated after use as a static argument it
silently reuses the old compilation.

Every number that follows from others is a property: parameter counts and training FLOPs stand in
`dsv3_jax/counts.py`. Sources are sections of arXiv 2412.19437 unless said otherwise.
"""

import dataclasses
import difflib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict


class ConfigError(ValueError):
  """A value that cannot work; the message names the key, the value and what would be right."""


@dataclasses.dataclass(frozen=True)
class Mla:
  """Multi-head Latent Attention (2.1.1)."""

  num_heads: int = 128
  q_rank: int = 1536  # d_c'; 0 projects queries directly, as V2-Lite does
  kv_rank: int = 512  # d_c
  nope_dim: int = 128  # d_h, per head, without position
  rope_dim: int = 64  # d_h^R, per head for queries, shared by all heads for keys
  v_dim: int = 128
  block: int = 512  # queries and keys per block of the blockwise attention


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary embedding, with YaRN (4.3) where `model.max_length` exceeds `original_length`."""

  theta: float = 10_000.0
  factor: float = 40.0
  original_length: int = 4096
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  mscale: float = 1.0  # scales cos and sin by m(mscale) / m(mscale_all_dim); 1 in every release
  mscale_all_dim: float = 1.0  # scales the softmax by m(mscale_all_dim)^2


@dataclasses.dataclass(frozen=True)
class Dispatch:
  """How tokens reach their experts and come back; forms in `dsv3_jax/parallel/dispatch.py`."""

  form: str = 'auto'  # 'auto' | 'two_hop' | 'flat' | 'allgather' | 'ragged' | 'dense' (oracle)
  capacity: float = (
    1.25  # buffers over what even routing needs; what does not fit goes in more rounds
  )
  payload: str = (
    'fp8'  # out (3.3.2): 'fp8', 1x128, power-of-two scales | 'bf16' | 'plain', as computed
  )
  combine: str = 'bf16'  # back: 'bf16' | 'logfmt8' | 'logfmt10' (2505.09343) | 'plain'


@dataclasses.dataclass(frozen=True)
class Moe:
  """DeepSeekMoE (2.1.2)."""

  num_experts: int = 256
  num_shared: int = 1
  top_k: int = 8
  expert_dim: int = 2048
  num_groups: int = 8
  top_groups: int = 4
  scoring: str = 'sigmoid'  # 'sigmoid' (V3: biased, a group is its two best) | 'softmax' (V2)
  normalize: bool = True  # weights of the chosen experts sum to 1 before the route scale
  route_scale: float = 2.5
  dispatch: Dispatch = Dispatch()


@dataclasses.dataclass(frozen=True)
class Model:
  vocab_size: int = 129_280
  dim: int = 7168
  ffn_dim: int = 18_432  # hidden width of the dense layers
  num_layers: int = 61
  num_dense_layers: int = 3  # the first ones
  mtp_depth: int = 1  # 2.2
  norm_eps: float = 1e-6
  init_std: float = 0.006  # 4.2
  max_length: int = 4096  # longest sequence the model is set up for; decides whether YaRN is on
  # Operands of the matmuls: 'bf16' | 'fp32' | 'fp8' (3.3) | variants of it in `precision/recipe.py`;
  # weights and sums stay FP32.
  precision: str = 'bf16'
  remat: str = 'latents'  # 'none' | 'block' | 'latents' (3.3.3: RMSNorms and MLA up-projections)
  unroll: int = 1  # layers per iteration of the scan; more is faster on CPU and compiles longer
  # 3.4.1: two halves of a device's rows go through the layers out of step, so that one's exchange stands
  # beside the other's compute.
  dual_batch: bool = False
  mla: Mla = Mla()
  rope: Rope = Rope()
  moe: Moe = Moe()


@dataclasses.dataclass(frozen=True)
class Batch:
  """Sizes of a step (4.2). The ramp is linear in tokens; the report does not give its shape."""

  seq_len: int = 4096
  size: int = 15_360  # sequences per step after the ramp
  start_size: int = 3072
  ramp_tokens: float = 469e9
  micro_size: int = 3072  # sequences per micro-batch, over all devices; the rest accumulates


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """AdamW and its four-phase learning rate as a function of tokens seen (4.2)."""

  peak_lr: float = 2.2e-4
  warmup_steps: int = 2000
  constant_tokens: float = 10e12  # the peak is held until here
  decay_tokens: float = 4.3e12  # then cosine to end_lr
  end_lr: float = 2.2e-5
  end_tokens: float = 333e9  # then end_lr
  final_lr: float = 7.3e-6  # then this one, to the end
  beta1: float = 0.9
  beta2: float = 0.95
  eps: float = 1e-8  # not given in the report
  weight_decay: float = 0.1  # on matrices; norms are left alone
  clip_norm: float = 1.0
  moments: str = 'bf16'  # 'bf16' | 'fp32' (3.3.3)
  ema_decay: float = 0.999  # 3.2.3 keeps an average of the weights and gives no decay; 0 keeps none


@dataclasses.dataclass(frozen=True)
class Objective:
  """Loss = CE + mtp_weight / D * MTP + balance_alpha * balance (2.1.2, 2.2, 4.2)."""

  mtp_weight: float = 0.3
  mtp_weight_late: float = 0.1
  mtp_late_tokens: float = 10e12
  balance_alpha: float = 1e-4
  bias_speed: float = 1e-3  # gamma
  bias_stop_tokens: float = 14.3e12  # gamma is 0 from here


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Device mesh; the axes are described in `dsv3_jax/mesh.py`."""

  pipe: int = 1  # stages: 1, or an even number (3.2.1: 16)
  data: int = 1
  node: int = 1
  local: int = 1
  zero: int = 1  # state: 0 replicated | 1 split, gathered once a step | 3 gathered by layer


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """How ranks run with `mesh.pipe` > 1."""

  # 'uniform': one program, all ranks the same kind of thing at a time | 'mpmd': DualPipe's own order (3.2.1),
  # each rank programs of its own
  executor: str = 'uniform'


@dataclasses.dataclass(frozen=True)
class Data:
  corpus: str = 'python_stdlib'  # that | a prepared TFDS name | a folder of text or JSONL files
  text_key: str = 'text'  # field that holds the text, for TFDS and JSONL
  tokenizer: str = ''  # a tokenizer.json; '' trains a BPE of model.vocab_size on the corpus
  fim_rate: float = 0.1  # documents turned into prefix-suffix-middle (4.1)
  shuffle_rows: int = (
    1024  # rows of the packed stream that are shuffled at a time; 1 keeps its order
  )
  heldout: float = 0.02  # fraction of the documents kept for evaluation
  cache_dir: str = ''  # prepared corpora and trained tokenizers; '' is ~/.cache/dsv3_jax
  workers: int = 0  # worker processes of the input pipeline


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  every_steps: int = 500
  keep_last: int = 3
  keep_every: int = 0  # steps; 0 keeps only the last ones


@dataclasses.dataclass(frozen=True)
class Run:
  total_tokens: float = 14.8e12
  seed: int = 0
  log_every: int = 10
  eval_every: int = 1000  # 0: only at the end
  eval_bytes: int = 50_000_000  # of the held-out text
  prompt: str = 'def '  # of the sample at the end
  init_from: str = ''  # folder of an import or a run to take weights and tokenizer from


@dataclasses.dataclass(frozen=True)
class Config:
  model: Model = Model()
  batch: Batch = Batch()
  optimizer: Optimizer = Optimizer()
  objective: Objective = Objective()
  mesh: Mesh = Mesh()
  pipeline: Pipeline = Pipeline()
  data: Data = Data()
  checkpoint: Checkpoint = Checkpoint()
  run: Run = Run()


# ---- ConfigDict in, dataclasses out --------------------------------------------------------------


def default() -> ml_collections.ConfigDict:
  """The report's values as a locked ConfigDict, for `configs/*.py` to edit."""
  return ml_collections.ConfigDict(dataclasses.asdict(Config())).lock()


def freeze(config: ml_collections.ConfigDict) -> Config:
  """Turns a ConfigDict into a checked `Config`; raises ConfigError with one line per fault."""
  return check(_build(Config, config, ''))


def to_json(config: Config) -> str:
  return json.dumps(dataclasses.asdict(config), indent=2) + '\n'


def from_json(text: str) -> Config:
  values = json.loads(text)
  if not isinstance(values, dict):
    raise ConfigError(f'{text[:40]!r}: not a JSON object of config keys')
  return check(_build(Config, values, ''))


def differences(a: Config, b: Config) -> list[str]:
  """'key: a_value -> b_value' for every leaf in which two configs differ."""
  flat_a, flat_b = flatten(a), flatten(b)
  return [f'{k}: {flat_a[k]} -> {flat_b[k]}' for k in flat_a if flat_a[k] != flat_b[k]]


def flatten(config: Any, prefix: str = '') -> dict[str, Any]:
  """{'model.mla.num_heads': 128, ...}"""
  flat = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    key = prefix + field.name
    flat |= flatten(value, key + '.') if dataclasses.is_dataclass(value) else {key: value}
  return flat


def variant(config: ml_collections.ConfigDict, arg: str) -> ml_collections.ConfigDict:
  """What `get_config(arg)` returns: the config itself for '', shrunk in place for 'debug'."""
  if arg not in ('', 'debug'):
    raise ConfigError(f"unknown argument {arg!r}; the only one known is 'debug'")
  return debug(config) if arg else config


def debug(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Shrinks any config, in place, to seconds on a laptop while every mechanism stays on."""
  m, attention, experts = config.model, config.model.mla, config.model.moe
  with config.ignore_type(), config.unlocked():
    yarn = m.max_length > m.rope.original_length
    m.update(vocab_size=512, dim=32, ffn_dim=64, max_length=128 if yarn else 64)
    m.num_dense_layers = min(m.num_dense_layers, 1)
    m.num_layers = m.num_dense_layers + 2
    m.rope.original_length = 64
    attention.update(num_heads=2, q_rank=16 if attention.q_rank else 0, kv_rank=16)
    attention.update(nope_dim=8, rope_dim=4, v_dim=8, block=16)
    groups = min(experts.num_groups, 4)
    experts.update(num_experts=8, top_k=2, expert_dim=16, num_groups=groups)
    experts.top_groups = min(experts.top_groups, max(groups // 2, 1))
    config.batch.update(seq_len=32, size=8, start_size=8, ramp_tokens=0.0, micro_size=8)
    config.optimizer.update(peak_lr=3e-3, warmup_steps=2, end_lr=3e-4)
    config.optimizer.update(constant_tokens=3840.0, decay_tokens=1280.0, end_tokens=0.0)
    config.objective.update(mtp_late_tokens=3840.0, bias_stop_tokens=4608.0)
    config.data.shuffle_rows = 32
    config.checkpoint.update(every_steps=10)
    config.run.update(total_tokens=5120.0, log_every=1, eval_every=0, eval_bytes=20_000)
  return config


def check_key(key: str, given: str) -> None:
  """Raises ConfigError unless dotted `key` is a value of `Config`; `given` opens the message."""
  flat = flatten(Config())
  if key in flat:
    return
  below = [k for k in flat if k.startswith(key + '.')]
  if below:
    raise ConfigError(f'{given}: a group of keys; set one of them, such as {below[0]}')
  group, dot, name = key.rpartition('.')
  here = {k.removeprefix(group + dot).partition('.')[0] for k in flat if k.startswith(group + dot)}
  # The right name in another group, the key as a whole, the name alone, a neighbour.
  names = {k.rpartition('.')[2]: k for k in flat}
  near = [names[name]] if name in names else []
  near += difflib.get_close_matches(key, flat, 1, cutoff=0.85)
  near += [names[n] for n in difflib.get_close_matches(name, names, 1, cutoff=0.85)]
  near += [group + dot + n for n in difflib.get_close_matches(name, here, 1)]
  known = f'known here: {", ".join(sorted(here)) or ", ".join(_names(Config))}'
  raise ConfigError(f'{given}: no such key; {f"did you mean {near[0]}?" if near else known}')


def _build(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
  kinds = {f.name: f.type for f in dataclasses.fields(cls)}
  arguments = {}
  for name in values:
    key = prefix + name
    if name not in kinds:
      check_key(key, f'{key} = {values[name]!r}')
    kind = kinds[name]
    try:
      value = values[name]
    except config_dict.RequiredValueError:
      raise ConfigError(f'{key}: has no value, and the config file requires one') from None
    if dataclasses.is_dataclass(kind):
      if not isinstance(value, Mapping | ml_collections.ConfigDict):
        raise ConfigError(f'{key} = {value!r}: must be a group of keys: {", ".join(_names(kind))}')
      arguments[name] = _build(kind, value, key + '.')
      continue
    if kind is float and type(value) is int:
      value = float(value)
    if type(value) is not kind:
      raise ConfigError(f'{key} = {value!r}: must be {_KINDS[kind]}, not {type(value).__name__}')
    arguments[name] = value
  return cls(**arguments)


def _names(cls: type) -> list[str]:
  return [f.name for f in dataclasses.fields(cls)]


# ---- what can work -------------------------------------------------------------------------------

_KINDS = {int: 'a whole number', float: 'a number', str: 'a string', bool: 'True or False'}
_CHOICES = {
  'model.precision': (
    'bf16',
    'fp32',
    'fp8',
    'fp8_gradient_blocks',
    'fp8_gradient_e5m2',
    'fp8_sums_fp22',
  ),
  'model.remat': ('none', 'block', 'latents'),
  'model.moe.scoring': ('sigmoid', 'softmax'),
  'model.moe.dispatch.form': ('auto', 'two_hop', 'flat', 'allgather', 'ragged', 'dense'),
  'model.moe.dispatch.payload': ('fp8', 'bf16', 'plain'),
  'model.moe.dispatch.combine': ('bf16', 'logfmt8', 'logfmt10', 'plain'),
  'optimizer.moments': ('bf16', 'fp32'),
  'mesh.zero': (0, 1, 3),
  'pipeline.executor': ('uniform', 'mpmd'),
}
_MAY_BE_ZERO = {
  'model.num_dense_layers', 'model.mtp_depth', 'model.mla.q_rank', 'model.moe.num_shared',
  'model.rope.mscale', 'model.rope.mscale_all_dim', 'batch.ramp_tokens', 'optimizer.warmup_steps',
  'optimizer.constant_tokens', 'optimizer.decay_tokens', 'optimizer.end_tokens',
  'optimizer.end_lr', 'optimizer.final_lr', 'optimizer.beta1', 'optimizer.beta2',
  'optimizer.weight_decay', 'optimizer.ema_decay', 'objective.mtp_weight',
  'objective.mtp_weight_late', 'objective.mtp_late_tokens', 'objective.balance_alpha',
  'objective.bias_speed', 'objective.bias_stop_tokens', 'data.fim_rate', 'data.workers',
  'checkpoint.keep_every', 'run.seed', 'run.eval_every',
}  # fmt: skip
_MAY_BE_EMPTY = {'data.tokenizer', 'data.cache_dir', 'run.prompt', 'run.init_from'}
_BELOW_ONE = ('optimizer.beta1', 'optimizer.beta2', 'optimizer.ema_decay', 'data.heldout')


def _check_pipeline(c: Config, want: Callable[[bool, str, str], None]) -> None:
  """DualPipe feeds half of the micro-batches from each end (3.2.1); a stage has a block at least."""
  pipe, m, b = c.mesh.pipe, c.model, c.batch
  even = f'be 1 or even ({pipe - 1} or {pipe + 1}): micro-batches enter at both ends'
  want(pipe % 2 == 0, 'mesh.pipe', even)
  blocks = m.num_layers + m.mtp_depth
  most = f'be at most {blocks - blocks % 2}: model.num_layers + model.mtp_depth = {blocks} blocks'
  want(pipe <= blocks, 'mesh.pipe', most)
  # The last stage, which has the MTP modules, is one of the shortest.
  room = (
    f'be at most {max(blocks // m.mtp_depth, 1)}: the last stage has all MTP modules'
    if m.mtp_depth
    else ''
  )
  want(blocks // pipe >= m.mtp_depth, 'mesh.pipe', room)
  want(
    c.mesh.zero == 1, 'mesh.zero', 'be 1 with mesh.pipe > 1: stages are gathered from a split state'
  )
  alone = 'be False with mesh.pipe > 1, where forward and backward overlap'
  want(not m.dual_batch, 'model.dual_batch', alone)
  count, ways = b.size // b.micro_size, c.mesh.data * c.mesh.node * c.mesh.local
  right = [
    n for n in range(ways, b.micro_size, ways) if b.size % (2 * n) == 0 and b.size // n >= 2 * pipe
  ]
  could = f'be {right[-1]}' if right else f'divide a larger batch.size, at least {2 * pipe * ways}'
  why = f'{could}: mesh.pipe = {pipe} wants an even number of at least {2 * pipe} micro-batches, not {count}'
  want(count % 2 == 0 and count >= 2 * pipe, 'batch.micro_size', why)


def check(c: Config) -> Config:
  """Returns `c`, or raises ConfigError naming every key that cannot work, a line each."""
  flat = flatten(c)
  faults = []

  def want(holds: bool, key: str, right: str) -> None:
    if not holds:
      faults.append(f'{key} = {flat[key]!r}: must {right}')

  def at_most(key: str, other: str) -> None:
    want(flat[key] <= flat[other], key, f'be at most {other} = {flat[other]!r}')

  def multiple(key: str, *others: str) -> None:
    product = math.prod(flat[other] for other in others)
    is_what = f'{product} = {" * ".join(others)}' if len(others) > 1 else f'{others[0]} = {product}'
    want(flat[key] % product == 0, key, f'be a multiple of {is_what}')

  # ---- each value by itself ----------------------------------------------------------------------
  for key, value in flat.items():
    if key in _CHOICES:
      want(value in _CHOICES[key], key, f'be one of {", ".join(map(repr, _CHOICES[key]))}')
    elif type(value) is float and not math.isfinite(value):
      want(False, key, 'be a finite number')
    elif type(value) in (int, float):
      zero = key in _MAY_BE_ZERO
      want(value > 0 or (zero and value == 0), key, 'not be negative' if zero else 'be positive')
    elif type(value) is str:
      want(bool(value) or key in _MAY_BE_EMPTY, key, 'not be empty')
  if faults:  # what follows divides by some of them
    raise ConfigError('\n'.join(faults))
  for key in _BELOW_ONE:
    want(flat[key] < 1, key, 'be below 1')
  want(c.data.fim_rate <= 1, 'data.fim_rate', 'be at most 1: it is a rate')
  want(c.run.seed < 2**32, 'run.seed', f'be below 2**32 = {2**32}')

  # ---- the model ---------------------------------------------------------------------------------
  m, e = c.model, c.model.moe
  layers = f'be below model.num_layers = {m.num_layers}: one layer has experts'
  want(m.num_dense_layers < m.num_layers, 'model.num_dense_layers', layers)
  want(m.mla.rope_dim % 2 == 0, 'model.mla.rope_dim', 'be even: dimensions rotate in pairs')
  want(m.rope.theta > 1, 'model.rope.theta', 'be above 1')
  want(m.rope.factor >= 1, 'model.rope.factor', 'be at least 1')
  slow = f'be above model.rope.beta_slow = {m.rope.beta_slow!r}'
  want(m.rope.beta_fast > m.rope.beta_slow, 'model.rope.beta_fast', slow)
  multiple('model.moe.num_experts', 'model.moe.num_groups')
  at_most('model.moe.top_groups', 'model.moe.num_groups')
  per_group = e.num_experts // e.num_groups
  kept = e.top_groups * per_group
  want(e.top_k <= kept, 'model.moe.top_k', f'be at most {kept}: so many experts are in kept groups')
  if e.scoring == 'sigmoid' and e.num_groups > 1:
    pairs = f'be at most {e.num_experts // 2}, two experts a group: its two best rank it'
    want(per_group >= 2, 'model.moe.num_groups', pairs)
  if e.scoring == 'softmax':
    want(
      c.objective.bias_speed == 0,
      'objective.bias_speed',
      'be 0: softmax routing has no bias to move',
    )

  # ---- the step and the run ----------------------------------------------------------------------
  at_most('batch.seq_len', 'model.max_length')
  length = f'be below batch.seq_len = {c.batch.seq_len}'
  want(m.mtp_depth < c.batch.seq_len, 'model.mtp_depth', length)
  at_most('batch.start_size', 'batch.size')
  multiple('batch.size', 'batch.micro_size')
  multiple('batch.start_size', 'batch.micro_size')
  multiple('batch.micro_size', 'mesh.data', 'mesh.node', 'mesh.local')
  ways = c.mesh.data * c.mesh.node * c.mesh.local
  if m.dual_batch and c.batch.micro_size % ways == 0:
    halved = f'be a multiple of {2 * ways}: model.dual_batch halves the rows of each device'
    want(c.batch.micro_size % (2 * ways) == 0, 'batch.micro_size', halved)
  multiple('model.moe.num_experts', 'mesh.node', 'mesh.local')
  form = e.dispatch.form
  if form == 'two_hop' and c.mesh.node > 1:
    whole = f'be a multiple of mesh.node = {c.mesh.node}: two_hop wants whole groups on a node'
    want(e.num_groups % c.mesh.node == 0, 'model.moe.num_groups', whole)
    fewer = (
      f"be at most mesh.node = {c.mesh.node}: two_hop would limit no token's nodes; 'auto' may"
    )
    want(e.top_groups <= c.mesh.node, 'model.moe.top_groups', fewer)
  if form in ('allgather', 'dense') and e.dispatch.combine.startswith('logfmt'):
    summed = f"be 'bf16' or 'plain': {form} sums on the way, where codes cannot be added"
    want(False, 'model.moe.dispatch.combine', summed)
  if c.mesh.pipe > 1:
    _check_pipeline(c, want)
  at_most('optimizer.end_lr', 'optimizer.peak_lr')
  rows = 2**32 - c.batch.size  # the state counts sequences in 32 bits
  most = f'be at most {rows * c.batch.seq_len}: 2**32 sequences of batch.seq_len'
  want(c.run.total_tokens <= rows * c.batch.seq_len, 'run.total_tokens', most)
  if faults:
    raise ConfigError('\n'.join(faults))
  return c
