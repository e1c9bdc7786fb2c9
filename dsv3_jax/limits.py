"""What can work: the range of each value, and sizes that must fit each other."""

import math
from collections.abc import Callable

from dsv3_jax.schema import Config, ConfigError, flatten

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
  'pipeline.weight_part': ('deferred', 'at_once'),
}
_MAY_BE_ZERO = {
  'model.num_dense_layers', 'model.mtp_depth', 'model.mla.q_rank', 'model.moe.num_shared',
  'model.rope.mscale', 'model.rope.mscale_all_dim', 'batch.ramp_tokens', 'optimizer.warmup_steps',
  'optimizer.constant_tokens', 'optimizer.decay_tokens', 'optimizer.end_tokens',
  'optimizer.end_lr', 'optimizer.final_lr', 'optimizer.beta1', 'optimizer.beta2',
  'optimizer.weight_decay', 'optimizer.ema_decay', 'objective.mtp_weight',
  'objective.mtp_weight_late', 'objective.mtp_late_tokens', 'objective.balance_alpha',
  'objective.bias_speed', 'objective.bias_stop_tokens', 'data.fim_rate', 'data.workers',
  'checkpoint.keep_every', 'run.seed', 'run.eval_every', 'mesh.zero_permutes',
}  # fmt: skip
_MAY_BE_EMPTY = {'data.tokenizer', 'data.cache_dir', 'run.prompt', 'run.init_from'}
_BELOW_ONE = ('optimizer.beta1', 'optimizer.beta2', 'optimizer.ema_decay', 'data.heldout')


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
  if c.mesh.zero_permutes:
    want(c.mesh.zero == 3, 'mesh.zero_permutes', f'be 0 with mesh.zero = {c.mesh.zero}')
    for axis in ('data', 'node', 'local'):
      size = flat[f'mesh.{axis}']
      doubled = 'be a power of two with mesh.zero_permutes, which double a part in each step'
      want(size & (size - 1) == 0, f'mesh.{axis}', doubled)
  if c.mesh.pipe > 1:
    _check_pipeline(c, want)
  at_most('optimizer.end_lr', 'optimizer.peak_lr')
  rows = 2**32 - c.batch.size  # the state counts sequences in 32 bits
  most = f'be at most {rows * c.batch.seq_len}: 2**32 sequences of batch.seq_len'
  want(c.run.total_tokens <= rows * c.batch.seq_len, 'run.total_tokens', most)
  if faults:
    raise ConfigError('\n'.join(faults))
  return c


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
  uniform = "be 'deferred' with pipeline.executor='mpmd', whose order has places for it"
  deferred = c.pipeline.weight_part == 'deferred'
  want(deferred or c.pipeline.executor == 'uniform', 'pipeline.weight_part', uniform)
  alone = 'be False with mesh.pipe > 1, where forward and backward overlap'
  want(not m.dual_batch, 'model.dual_batch', alone)
  count, ways = b.size // b.micro_size, c.mesh.data * c.mesh.node * c.mesh.local
  right = [
    n for n in range(ways, b.micro_size, ways) if b.size % (2 * n) == 0 and b.size // n >= 2 * pipe
  ]
  could = f'be {right[-1]}' if right else f'divide a larger batch.size, at least {2 * pipe * ways}'
  why = f'{could}: mesh.pipe = {pipe} wants an even number of at least {2 * pipe} micro-batches, not {count}'
  want(count % 2 == 0 and count >= 2 * pipe, 'batch.micro_size', why)
