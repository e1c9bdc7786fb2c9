"""Benchmarks of generation: `python -m dsv3_jax.inference.bench WHAT`, a JSON on stdout.

  context                  time and memory of a decoded token, latent against expanded cache, by context
  peer [WORKDIR]           tokens/s of the engine and of transformers' generate (`bench_peer`)
  drafts WORKDIR           what drafts of the MTP module give on held-out text, batch 1, and by which rule

All sides of a comparison take turns in one process, and the ratio of a turn is taken before the median: on
a shared machine only ratios within one run mean anything.

`context` decodes one sequence with caches that are filled with zeros, which take as long as others, of a
model of 4 layers, 16 heads and V3's rule for all else, YaRN at the lengths that ask for it. An expanded cache
of more than 4 GB, as at 128K, is left out: on most machines it would not fit beside anything else.
"""

import argparse
import dataclasses
import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from dsv3_jax import config, console, mesh, runtime
from dsv3_jax.config import ConfigError
from dsv3_jax.inference import acceptance, bench_engine, expanded
from dsv3_jax.inference.bench_engine import PROMPT, spread
from dsv3_jax.inference.bench_peer import peer
from dsv3_jax.inference.decode import Decoder
from dsv3_jax.inference.requests import Request
from dsv3_jax.inference.sampling import GREEDY, Sampling, Samplings
from dsv3_jax.inference.step import How, Rows
from dsv3_jax.kernels.mla_decode import PAGE
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.training import reading, workdir
from dsv3_jax.training.checkpoint import CheckpointError

_MOST_BYTES = 4e9  # of an expanded cache that is measured


# ---- context -------------------------------------------------------------------------------------


def _context_model(longest: int) -> config.Config:
  d = config.default()
  m = d.model
  m.update(vocab_size=4096, dim=256, ffn_dim=512, num_layers=4, num_dense_layers=1, mtp_depth=0)
  m.update(max_length=longest, precision='fp32', remat='none')
  m.mla.update(num_heads=16, q_rank=128, kv_rank=128, nope_dim=64, rope_dim=32, v_dim=64)
  m.moe.update(num_experts=8, top_k=2, expert_dim=128, num_groups=4, top_groups=2)
  d.mesh.zero = 0
  return config.freeze(d)


def expanded_step(c: config.Model, device_mesh: jax.sharding.Mesh, model: Transformer) -> Callable:
  """(tokens [B, 1], position [B, 1], cache, donated) -> tokens chosen [B], logits, cache; on one device."""
  blocks = expanded.layers(c, model)
  specs = P(), P(), P(mesh.TOKENS), P(mesh.TOKENS), P(mesh.TOKENS)
  run = lambda *args: expanded.step(c, *args)
  mapped = jax.shard_map(run, mesh=device_mesh, in_specs=specs, out_specs=P(mesh.TOKENS))

  def step(model: Transformer, blocks: list, tokens: jax.Array, at: jax.Array, cache: Any) -> Any:
    logits_BV, cache = mapped(model, blocks, tokens, at, cache)
    return jnp.argmax(logits_BV, axis=1), logits_BV, cache

  jitted = jax.jit(step, donate_argnums=4)
  return lambda tokens, at, cache: jitted(model, blocks, tokens, at, cache)


def latent_step(decoder: Decoder, context: int, vocab_size: int) -> Callable:
  """(tokens [1, 1], position [1, 1], cache, donated) -> tokens chosen, log probability, cache."""
  how = How(prompt=False, drafts=0, vocab_size=vocab_size)
  table_BJ = np.arange(-(-context // PAGE), dtype=np.int32)[None]
  ones, none = np.ones(1, np.int32), np.full(1, -1, np.int32)

  def step(tokens: np.ndarray, at: np.ndarray, cache: Any) -> Any:
    samplings = Samplings.of([GREEDY], [0])
    rows = Rows(tokens, at[:, 0], ones, table_BJ, none, samplings, np.array(False))
    chosen, cache = decoder.step(how, rows, cache)
    return chosen.tokens_BL[:, 0], chosen.logprob_BL[:, 0], cache

  return step


def context(args: argparse.Namespace) -> dict[str, Any]:
  contexts = [int(n) for n in args.contexts.split(',')]
  c = _context_model(max(contexts))
  device_mesh = mesh.make_mesh(c.mesh)
  model = jax.jit(lambda key: Transformer(c.model, key))(jax.random.key(0))
  decoder = Decoder(c.model, device_mesh, model)
  each = expanded_step(c.model, device_mesh, model)
  found = []
  for n in contexts:
    pages = -(-n // PAGE)
    sides = {'latent': (latent_step(decoder, n, c.model.vocab_size), decoder.empty(pages))}
    if n * expanded.bytes_per_token(c.model) <= _MOST_BYTES:
      sides['expanded'] = each, expanded.empty(c.model, 1, n)
    bytes_ = {
      name: sum(x.nbytes for x in jax.tree.leaves(cache)) for name, (_, cache) in sides.items()
    }
    seconds = {name: [] for name in sides}
    for turn in range(1 + args.turns):
      for name, (step, cache) in list(sides.items()):
        start = time.perf_counter()
        for i in range(args.steps):
          at = np.full((1, 1), n - 1 - i % 2, np.int32)
          token, _, cache = step(np.full((1, 1), i, np.int32), at, cache)
          jax.device_get(token)
        if turn:  # the first one compiles
          seconds[name].append((time.perf_counter() - start) / args.steps)
        sides[name] = step, cache
    told = {
      'context': n,
      'ms_per_token': {name: 1000 * statistics.median(s) for name, s in seconds.items()},
      'cache_bytes': bytes_,
    }
    if 'expanded' in sides:
      ratios = [b / a for a, b in zip(seconds['latent'], seconds['expanded'], strict=True)]
      told['expanded_over_latent'] = spread(ratios)
      told['memory_ratio'] = bytes_['expanded'] / bytes_['latent']
    found.append(told)
    print(json.dumps(found[-1]), file=sys.stderr)
    del sides, step, cache
  formula = expanded.bytes_per_token(c.model) / decoder.empty(1).bytes_per_token
  return {'contexts': found, 'memory_ratio_by_formula': formula}


# ---- drafts --------------------------------------------------------------------------------------


def drafts(args: argparse.Namespace) -> dict[str, Any]:
  loaded = workdir.load(args.workdir)
  c, model = loaded.config, loaded.model
  if not c.model.mtp_depth:
    raise ConfigError(f'{args.workdir}: its model has no MTP module (model.mtp_depth = 0)')
  tokens_BX, _ = reading.rows(loaded, None, args.rows * c.batch.seq_len)
  device_mesh = mesh.make_mesh(c.mesh)
  decoder = Decoder(c.model, device_mesh, model)
  engines = {k: bench_engine.make(c.model, decoder, 1, drafts=k) for k in range(args.drafts + 1)}
  prompts = [row[:PROMPT].tolist() for row in tokens_BX[: args.rows]]
  found = []
  for name, sampling in (('greedy', GREEDY), ('temperature 1', Sampling(1.0, 1.0, 1))):
    rates, stats = {k: [] for k in engines}, {}
    for engine in engines.values():
      engine.stats = dataclasses.replace(engine.stats, row_steps=0, drafts=0, accepted=0)
    for i, prompt in enumerate(prompts):
      told = []
      for k, engine in engines.items():
        before = engine.stats.decode_seconds
        [out] = bench_engine.run(engine, [Request(prompt, args.tokens, sampling, i)])
        rates[k].append((len(out) - 1) / (engine.stats.decode_seconds - before))
        told.append(out)
      if any(out != told[0] for out in told):
        raise AssertionError('drafts changed a token')
    for k, engine in engines.items():
      s = engine.stats
      stats[k] = {
        'tokens_per_s': statistics.median(rates[k]),
        'speed_up': spread([b / a for a, b in zip(rates[0], rates[k], strict=True)]),
        'acceptance': s.acceptance,
        'tokens_per_step': s.tokens_per_step,
      }
    found.append({'sampling': name, 'drafts': stats})
    print(json.dumps(found[-1]), file=sys.stderr)
  rules = rules_on(
    c.model, device_mesh, model, tokens_BX[: args.rows, :-1], loaded.tokenizer.vocab_size
  )
  return {
    'prompts': len(prompts),
    'tokens': args.tokens,
    'batch': 1,
    'decoding': found,
    'rules': rules,
  }


def rules_on(
  c: config.Model,
  device_mesh: jax.sharding.Mesh,
  model: Transformer,
  tokens_BL: np.ndarray,
  vocab_size: int,
) -> dict[str, float]:
  """Mean acceptance of a first draft on a text at temperature 1, by either rule (`acceptance`)."""

  def run(model: Transformer, tokens_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
    embed_BLD = model.embed(c, tokens_BL)
    hidden_BLD, _ = model.hidden(c, embed_BLD)
    further, _ = model.predict_further(c, hidden_BLD, embed_BLD)
    logits = lambda x: jnp.einsum('BLD,DV->BLV', x, model.head_DV[...])[..., :vocab_size]
    # The module at position i guesses what the model says behind i + 1.
    return tuple(jax.nn.softmax(logits(x)) for x in (hidden_BLD[:, 1:-1], further[0][:, :-2]))

  specs = P(), P(mesh.TOKENS)
  run = jax.jit(
    jax.shard_map(run, mesh=device_mesh, in_specs=specs, out_specs=(P(mesh.TOKENS), P(mesh.TOKENS)))
  )
  found = {'rejection': [], 'shared_noise': []}
  for i in range(len(tokens_BL)):
    for p_V, q_V in zip(
      *(np.asarray(x, np.float64)[0] for x in run(model, tokens_BL[i : i + 1])), strict=True
    ):
      found['rejection'].append(acceptance.rejection(p_V, q_V))
      found['shared_noise'].append(acceptance.shared_noise(p_V, q_V))
  means = {name: float(np.mean(values)) for name, values in found.items()}
  tokens = (1 + means['rejection']) / (1 + means['shared_noise'])
  return means | {'positions': len(found['rejection']), 'tokens_per_step_gained': tokens - 1}


# ---- program -------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
  """Exit code: 0, or 2 after one line about what cannot work."""
  return console.run('bench', _parse, _run, arguments, file='what', told=(CheckpointError,))


def _run(args: argparse.Namespace) -> None:
  runtime.log_warnings_only()
  figures = {'what': args.what, **args.measure(args)}
  figures |= {'cores': os.cpu_count(), 'load_average': os.getloadavg()[0], 'jax': jax.__version__}
  figures['date'] = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
  print(json.dumps(figures, indent=2))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
  parser = console.Parser(
    'python -m dsv3_jax.inference.bench', description='Benchmarks of generation.'
  )
  each = parser.add_subparsers(dest='what', required=True)
  one = each.add_parser('context')
  one.set_defaults(measure=context)
  one.add_argument('--contexts', default='1024,8192,32768,131072', help='tokens (%(default)s)')
  one.add_argument('--steps', type=int, default=4, help='of a side in its turn (%(default)s)')
  one.add_argument('--turns', type=int, default=5, help='(%(default)s)')
  one = each.add_parser('peer')
  one.set_defaults(measure=peer)
  one.add_argument('workdir', nargs='?', help='a run (untrained weights of the quickstart)')
  one.add_argument('--tokens', type=int, default=128, help='of each sequence (%(default)s)')
  one.add_argument('--turns', type=int, default=5, help='(%(default)s)')
  one = each.add_parser('drafts')
  one.set_defaults(measure=drafts)
  one.add_argument('workdir', help='a trained run')
  one.add_argument('--rows', type=int, default=24, help='held-out beginnings (%(default)s)')
  one.add_argument('--tokens', type=int, default=128, help='of each (%(default)s)')
  one.add_argument('--drafts', type=int, default=2, help='at most (%(default)s)')
  args = parser.parse_args(arguments)
  for name in ('steps', 'turns', 'tokens', 'rows'):
    if getattr(args, name, 1) < 1:
      raise ConfigError(f'--{name}={getattr(args, name)}: must be at least 1')
  return args


if __name__ == '__main__':
  sys.exit(main())
