"""Our train step beside transformers' DeepseekV3ForCausalLM: the same work, on CPU, in one process.

  python -m dsv3_jax.training.bench_transformers [--case base] [--steps 15]

wants the extra [parity]: torch and transformers. Both sides start from the same weights and are
given the same random tokens and learning rates; a step is forward, backward, clipping and AdamW in
FP32, on all cores the process may use. So their losses must agree, and the last line says how well.
Steps are taken in turn, a few of each side, and after every step the side's own library multiplies
two plain 2048^3 matrices: on a shared machine only ratios within one run mean anything. Neighbours
on the cores hurt OpenMP, which waits for its slowest thread, several times as much as XLA, which
hands out work as threads get free: where the medians of the matmul lie far below the best, compare
the best alone.

Choices, for the peer where there was one:
- Its fastest settings of those measured: `sdpa` attention, `grouped_mm` experts, fused AdamW, no
  `torch.compile`. Its malloc keeps freed memory as ours does: no page faults after the first steps.
- Idle threads leave the cores to the other side: OpenMP's spin for about 10 ms, XLA's below 1 ms.
- Balancing is without effect, for the peer has none: the balance loss is computed and weighs 0, the
  router's bias moves by 0. MTP, the average of the weights and remat are off.

Left out on both sides: the input pipeline, logging, compilation (before the first timed step).
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from einops import rearrange

from dsv3_jax import config, counts, flags, mesh, runtime
from dsv3_jax.config import ConfigError
from dsv3_jax.training import schedule, state
from dsv3_jax.training.step import make_step

CASES = ('base', 'long', 'wide')
_SIDE = 2048  # of the plain matmul
_WARM_UP = 3  # steps of each side before the timed ones
_TURN = 3  # steps of one side before it is the other's turn
_VERSIONS = ('jax', 'jaxlib', 'torch', 'transformers')


@dataclasses.dataclass(frozen=True)
class Side:
  """One of the two programs, its weights within, and what was measured of it, a value a step."""

  name: str
  parameters: int
  step: Callable[
    [np.ndarray, float], float
  ]  # (int32 rows [B, L + 1], learning rate) -> loss in nats
  load: Callable[[], float]  # of the last step: fullest expert over mean, in the worst layer
  matmul: Callable[[], None]
  seconds: list[float] = dataclasses.field(default_factory=list)
  matmul_seconds: list[float] = dataclasses.field(default_factory=list)
  losses: list[float] = dataclasses.field(default_factory=list)
  loads: list[float] = dataclasses.field(default_factory=list)
  faults: list[int] = dataclasses.field(default_factory=list)  # minor page faults

  def run(self, rows_BX: np.ndarray, rate: float) -> None:
    """One step and one matmul, both timed."""
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    start = time.perf_counter()
    self.losses.append(self.step(rows_BX, rate))
    self.seconds.append(time.perf_counter() - start)
    self.faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
    self.loads.append(self.load())
    start = time.perf_counter()
    self.matmul()
    self.matmul_seconds.append(time.perf_counter() - start)

  def figures(self, tokens: int, flops_per_token: float) -> dict[str, float]:
    """Times and rates of the timed steps, in seconds, tokens/s and FLOP/s."""
    fields = {}
    for name, of in (('median', statistics.median), ('best', min)):
      step, matmul = of(self.seconds[_WARM_UP:]), of(self.matmul_seconds[_WARM_UP:])
      rate, matmul_rate = tokens * flops_per_token / step, 2 * _SIDE**3 / matmul
      fields |= {f'step_s_{name}': step, f'tokens_per_s_{name}': tokens / step}
      fields |= {f'flops_per_s_{name}': rate, f'matmul_flops_per_s_{name}': matmul_rate}
      fields |= {f'of_matmul_{name}': rate / matmul_rate}
    fields['faults_per_step'] = statistics.median(self.faults[_WARM_UP:])
    fields['load'] = statistics.mean(self.loads[_WARM_UP:])
    return fields | {'first_loss': self.losses[0], 'last_loss': self.losses[-1]}


def adapt(values: ml_collections.ConfigDict, case: str) -> config.Config:
  """The config without what the peer lacks, in FP32 on one device; `case` reshapes it.

  'base': nothing. 'long': sequences twice as long, half as many. 'wide': dim, FFN and experts half
  as large again. Raises ConfigError.
  """
  m, b = values.model, values.batch
  m.update(mtp_depth=0, precision='fp32', remat='none')
  values.mesh.update(pipe=1, data=1, node=1, local=1, zero=0)
  values.optimizer.update(moments='fp32', ema_decay=0.0)
  values.objective.update(balance_alpha=0.0, bias_speed=0.0)
  if case == 'long':
    b.update(seq_len=2 * b.seq_len, size=max(b.size // 2, 1))
  elif case == 'wide':
    m.update(dim=m.dim * 3 // 2, ffn_dim=m.ffn_dim * 3 // 2)
    m.moe.expert_dim = m.moe.expert_dim * 3 // 2
  b.update(start_size=b.size, micro_size=b.size, ramp_tokens=0.0)
  return config.freeze(values)


# ---- the peer's words ----------------------------------------------------------------------------


def peer_sizes(m: config.Model) -> dict[str, Any]:
  """Arguments of its DeepseekV3Config; raises ConfigError for a model it does not know."""
  if m.moe.scoring != 'sigmoid':
    raise ConfigError(f"model.moe.scoring = {m.moe.scoring!r}: the peer knows 'sigmoid' alone")
  if not m.moe.num_shared:
    raise ConfigError('model.moe.num_shared = 0: the peer always has a shared expert')
  rope = {'rope_type': 'default', 'rope_theta': m.rope.theta}
  if m.max_length > m.rope.original_length:
    same = ('factor', 'beta_fast', 'beta_slow', 'mscale', 'mscale_all_dim')
    rope |= {'rope_type': 'yarn', **{name: getattr(m.rope, name) for name in same}}
    rope['original_max_position_embeddings'] = m.rope.original_length
  return {
    'vocab_size': m.vocab_size,
    'hidden_size': m.dim,
    'intermediate_size': m.ffn_dim,
    'moe_intermediate_size': m.moe.expert_dim,
    'num_hidden_layers': m.num_layers,
    'first_k_dense_replace': m.num_dense_layers,
    'num_attention_heads': m.mla.num_heads,
    'num_key_value_heads': m.mla.num_heads,
    'q_lora_rank': m.mla.q_rank or None,
    'kv_lora_rank': m.mla.kv_rank,
    'qk_nope_head_dim': m.mla.nope_dim,
    'qk_rope_head_dim': m.mla.rope_dim,
    'v_head_dim': m.mla.v_dim,
    'n_routed_experts': m.moe.num_experts,
    'n_shared_experts': m.moe.num_shared,
    'num_experts_per_tok': m.moe.top_k,
    'n_group': m.moe.num_groups,
    'topk_group': m.moe.top_groups,
    'norm_topk_prob': m.moe.normalize,
    'routed_scaling_factor': m.moe.route_scale,
    'max_position_embeddings': m.max_length,
    'rope_parameters': rope,
    'rms_norm_eps': m.norm_eps,
    'num_mtp_layers': 0,
    'use_cache': False,
    'tie_word_embeddings': False,
    'bos_token_id': 0,
    'eos_token_id': 1,
  }


def peer_weights(m: config.Model, params: Any, router_bias: Any) -> dict[str, np.ndarray]:
  """Our weights under its names; its matrices map from the last dimension to the first."""
  params, router_bias = jax.tree.map(np.asarray, (params, router_bias))
  weights = {
    'model.embed_tokens.weight': params['embed_VD'],
    'model.norm.weight': params['final_norm_D'],
    'lm_head.weight': params['head_DV'].T,
  }
  for layer in range(m.num_layers):
    dense = layer < m.num_dense_layers
    stack = 'dense_layers' if dense else 'moe_layers'
    row = layer if dense else layer - m.num_dense_layers
    block = jax.tree.map(lambda x, row=row: x[row], params[stack])
    a, f = block['attn'], block['ffn']
    named = {
      'input_layernorm': block['attn_norm_D'],
      'post_attention_layernorm': block['ffn_norm_D'],
      'self_attn.kv_a_proj_with_mqa': np.concatenate([a['kv_down_DC'], a['k_rope_DR']], 1).T,
      'self_attn.kv_a_layernorm': a['kv_norm_C'],
      'self_attn.kv_b_proj': rearrange(
        np.concatenate([a['k_up_CNH'], a['v_up_CNV']], 2), 'C N J -> (N J) C'
      ),
      'self_attn.o_proj': rearrange(a['out_NVD'], 'N V D -> D (N V)'),
    }
    if m.mla.q_rank:
      named['self_attn.q_a_proj'] = a['q_down_DQ'].T
      named['self_attn.q_a_layernorm'] = a['q_norm_Q']
      named['self_attn.q_b_proj'] = rearrange(a['q_up_QNJ'], 'Q N J -> (N J) Q')
    else:
      named['self_attn.q_proj'] = rearrange(a['q_DNJ'], 'D N J -> (N J) D')
    swiglu = f if dense else f['shared']
    where = 'mlp.' if dense else 'mlp.shared_experts.'
    for name in ('gate_DF', 'up_DF', 'down_FD'):
      named[f'{where}{name[:-3]}_proj'] = swiglu[name].T
    whole = {}
    if not dense:
      named['mlp.gate'] = f['router_DE'].T
      whole['mlp.gate.e_score_correction_bias'] = router_bias[stack]['ffn']['bias_E'][row]
      gate_up_EDF = np.concatenate([f['gate_EDF'], f['up_EDF']], 2)
      whole['mlp.experts.gate_up_proj'] = rearrange(gate_up_EDF, 'E D F -> E F D')
      whole['mlp.experts.down_proj'] = rearrange(f['down_EFD'], 'E F D -> E D F')
    whole |= {f'{name}.weight': weight for name, weight in named.items()}
    weights |= {f'model.layers.{layer}.{name}': weight for name, weight in whole.items()}
  return weights


# ---- the two sides -------------------------------------------------------------------------------


def make_peer(
  c: config.Config, weights: dict[str, np.ndarray], attention: str, experts: str
) -> Side:
  """transformers' model on PyTorch, as one would train it by hand."""
  import torch
  import transformers

  torch.set_num_threads(_cores())
  sizes = transformers.DeepseekV3Config(**peer_sizes(c.model))
  sizes._attn_implementation, sizes._experts_implementation = attention, experts
  model = transformers.DeepseekV3ForCausalLM(sizes).float().train()
  model.load_state_dict({name: torch.tensor(weight) for name, weight in weights.items()})

  # ---- AdamW: decay on matrices alone ------------------------------------------------------------
  o, parameters = c.optimizer, list(model.parameters())
  opt = torch.optim.AdamW(
    [
      {'params': [p for p in parameters if p.ndim > 1], 'weight_decay': o.weight_decay},
      {'params': [p for p in parameters if p.ndim == 1], 'weight_decay': 0.0},
    ],
    betas=(o.beta1, o.beta2),
    eps=o.eps,
    fused=True,
  )

  # ---- step --------------------------------------------------------------------------------------
  chosen = {}  # layer's router -> [T, K] of the last step
  for module in model.modules():
    if type(module).__name__ == 'DeepseekV3TopkRouter':
      module.register_forward_hook(lambda gate, _, out: chosen.update({gate: out[2]}))

  def step(rows_BX: np.ndarray, rate: float) -> float:
    for group in opt.param_groups:
      group['lr'] = rate
    rows_BX = torch.from_numpy(rows_BX).long()
    targets_BL = rows_BX[:, 1:].contiguous()
    # `shift_labels` are taken as they stand; `labels` alone would drop the last position.
    out = model(input_ids=rows_BX[:, :-1], labels=targets_BL, shift_labels=targets_BL)
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, o.clip_norm, foreach=True)
    opt.step()
    opt.zero_grad(set_to_none=True)
    return out.loss.item()

  def load() -> float:
    counts_YE = [
      ids.flatten().bincount(minlength=c.model.moe.num_experts) for ids in chosen.values()
    ]
    return max((count_E.max() / count_E.float().mean()).item() for count_E in counts_YE)

  x_XX = torch.ones(_SIDE, _SIDE)
  return Side('torch', sum(p.numel() for p in parameters), step, load, lambda: torch.mm(x_XX, x_XX))


def make_ours(c: config.Config, device_mesh: jax.sharding.Mesh, train_state: state.State) -> Side:
  """The step that `dsv3_jax.train` runs; its schedule gives the learning rate."""
  run = make_step(c, device_mesh)
  parameters = sum(x.size for x in jax.tree.leaves(train_state['params']))
  held = {'state': train_state}

  def step(rows_BX: np.ndarray, rate: float) -> float:
    del rate
    result = run(held['state'], jnp.asarray(rows_BX)[None], jnp.int32(1))
    held['state'], held['metrics'] = jax.block_until_ready(result)
    return float(held['metrics']['loss'])

  x_XX = jnp.ones((_SIDE, _SIDE), jnp.float32)
  matmul = jax.jit(jnp.dot)
  return Side(
    'dsv3_jax',
    parameters,
    step,
    lambda: float(jnp.max(held['metrics']['load'])),
    lambda: matmul(x_XX, x_XX).block_until_ready(),
  )


def _cores() -> int:
  """Cores this process may use; XLA:CPU takes as many."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


# ---- measuring and telling -----------------------------------------------------------------------


def measure(c: config.Config, sides: list[Side], steps: int) -> None:
  """Warms every side up, then lets them step in turn, on the same rows at the same learning rate."""
  rng = np.random.default_rng(c.run.seed)
  shape = (_WARM_UP + steps, c.batch.size, c.batch.seq_len + 1)
  rows_SBX = rng.integers(c.model.vocab_size, size=shape, dtype=np.int32)
  tokens = c.batch.size * c.batch.seq_len
  rates = [float(schedule.learning_rate(c.optimizer, s, s * tokens)) for s in range(len(rows_SBX))]
  for start in range(0, len(rows_SBX), _TURN):
    for side in sides:
      for rows_BX, rate in list(zip(rows_SBX, rates, strict=True))[start : start + _TURN]:
        side.run(rows_BX, rate)


_ROWS = (
  ('step, median, s', 'step_s_median', 1, '.3f'),
  ('step, best, s', 'step_s_best', 1, '.3f'),
  ('tokens/s, median', 'tokens_per_s_median', 1, ',.0f'),
  ('tokens/s, best', 'tokens_per_s_best', 1, ',.0f'),
  ('model GFLOP/s, median', 'flops_per_s_median', 1e-9, '.1f'),
  ('model GFLOP/s, best', 'flops_per_s_best', 1e-9, '.1f'),
  ('own matmul GFLOP/s, median', 'matmul_flops_per_s_median', 1e-9, '.1f'),
  ('own matmul GFLOP/s, best', 'matmul_flops_per_s_best', 1e-9, '.1f'),
  ('model over matmul, median', 'of_matmul_median', 1, '.3f'),
  ('model over matmul, best', 'of_matmul_best', 1, '.3f'),
  ('fullest expert over mean', 'load', 1, '.3f'),
  ('page faults a step', 'faults_per_step', 1, ',.0f'),
  ('parameters', 'parameters', 1, ',.0f'),
  ('loss of the first step', 'first_loss', 1, '.5f'),
  ('loss of the last step', 'last_loss', 1, '.5f'),
)


def table(peer: dict[str, float], ours: dict[str, float]) -> str:
  """A row a figure: the peer's, ours, ours over the peer's."""
  lines = [f'{"":28}{"torch":>12}{"dsv3_jax":>12}{"ratio":>9}']
  for title, key, unit, form in _ROWS:
    a, b = peer[key], ours[key]
    ratio = f'{b / a:.3f}' if a else '-'
    lines.append(f'{title:28}{a * unit:>12{form}}{b * unit:>12{form}}{ratio:>9}')
  return '\n'.join(lines)


def _device() -> str:
  """'Intel(R) Xeon(R) ..., 2 cores'."""
  name = platform.processor() or platform.machine()
  if os.path.exists('/proc/cpuinfo'):
    with open('/proc/cpuinfo', encoding='utf-8') as file:
      name = next((line.partition(':')[2].strip() for line in file if 'model name' in line), name)
  return f'{name}, {_cores()} cores'


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--config', default='configs/quickstart.py', help='PATH, or PATH:ARG')
  parser.add_argument('--case', choices=CASES, default='base')
  parser.add_argument('--steps', type=int, default=15, help='timed steps of each side')
  parser.add_argument('--attention', choices=('sdpa', 'eager'), default='sdpa', help="the peer's")
  experts = ('grouped_mm', 'batched_mm', 'eager')
  parser.add_argument('--experts', choices=experts, default='grouped_mm', help="the peer's")
  args = parser.parse_args()
  if args.steps < 1:
    parser.error(f'--steps {args.steps}: must be at least 1')

  # ---- host: malloc first, before either library allocates ---------------------------------------
  runtime.keep_freed_memory()
  missing = [name for name in ('torch', 'transformers') if not importlib.util.find_spec(name)]
  if missing:
    told = "install the extra: pip install '.[parity]'"
    print(f'{", ".join(missing)}: not installed; {told}', file=sys.stderr)
    return 2
  jax.config.update('jax_platforms', 'cpu')
  try:
    c = adapt(flags.load(args.config), args.case)
    peer_sizes(c.model)
  except ConfigError as error:
    print(error, file=sys.stderr)
    return 2

  # ---- both sides, from the same weights ---------------------------------------------------------
  device_mesh = mesh.make_mesh(c.mesh)
  train_state = state.init(c, device_mesh)
  weights = peer_weights(c.model, train_state['params'], train_state['router_bias'])
  sides = [
    make_peer(c, weights, args.attention, args.experts),
    make_ours(c, device_mesh, train_state),
  ]
  measure(c, sides, args.steps)

  # ---- figures -----------------------------------------------------------------------------------
  tokens = c.batch.size * c.batch.seq_len
  flops = counts.training_flops_per_token(c.model, c.batch.seq_len)
  figures = [s.figures(tokens, flops) | {'parameters': s.parameters} for s in sides]
  apart = max(abs(a - b) for a, b in zip(sides[0].losses, sides[1].losses, strict=True))
  print(f'{args.config}, {args.case}: {c.batch.size} sequences of {c.batch.seq_len} tokens a step, '
        f'{flops / 1e6:.1f} MFLOP a token, {args.steps} steps each on {_device()}')  # fmt: skip
  print(table(*figures))
  print(f'losses of all {_WARM_UP + args.steps} steps agree within {apart:.1e}')
  record = vars(args) | {'size': c.batch.size, 'seq_len': c.batch.seq_len, 'flops_per_token': flops}
  record |= {s.name: f for s, f in zip(sides, figures, strict=True)} | {'losses_apart': apart}
  record |= {'device': _device(), 'load_average': os.getloadavg()[0]}
  record['versions'] = {name: importlib.metadata.version(name) for name in _VERSIONS}
  record['versions']['python'] = platform.python_version()
  record['date'] = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
  print(json.dumps(record))
  return 0


if __name__ == '__main__':
  sys.exit(main())
