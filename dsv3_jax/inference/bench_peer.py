"""`bench peer`: the engine beside transformers' `generate` on the same weights (extra [parity]).

Greedy, to a fixed length, all sides in FP32: the engine without drafts and with one by the MTP module where
the weights have it, on one device and, where the process has more and they can share the batch, on all.
transformers' fastest expert implementation and number of threads are found first and taken: on cores with
other work OpenMP, which waits for its slowest thread, may be faster with one.

XLA's CPU device hardly uses a second core for matmuls of 16 rows; two emulated ones with 8 rows each do.
"""

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax import config, flags, mesh
from dsv3_jax.config import ConfigError
from dsv3_jax.inference import bench_engine
from dsv3_jax.inference.bench_engine import PROMPT, spread
from dsv3_jax.inference.decode import Decoder
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.requests import Request
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.training import bench_transformers, workdir

_BATCHES = 1, 16


def peer(args: argparse.Namespace) -> dict[str, Any]:
  missing = [name for name in ('torch', 'transformers') if not importlib.util.find_spec(name)]
  if missing:
    raise ConfigError(
      f"{', '.join(missing)}: not installed; install the extra: pip install '.[parity]'"
    )
  c, model = _model(args.workdir)
  devices = jax.device_count()
  decoders = {n: _decoder(c, model, n) for n in sorted({1, devices})}
  generate = _transformers(c, model)
  rng = np.random.default_rng(0)
  found = []
  for batch in _BATCHES:
    engines = {
      _name(n, drafts): bench_engine.make(c, decoder, batch, drafts)
      for n, decoder in decoders.items()
      if batch % n == 0
      for drafts in range(1 + bool(c.mtp_depth))
    }
    draw = lambda batch=batch: rng.integers(6, c.vocab_size, (batch, PROMPT))
    few = min(args.tokens, 16)
    fastest = min(_ways(), key=lambda how: _timed(generate, how, draw(), few)[1])
    for engine in engines.values():
      _timed(_ours, engine, draw(), args.tokens)
    seconds = {name: [] for name in (*engines, 'transformers')}
    same, tokens = dict.fromkeys(engines, 0), batch * args.tokens
    for _ in range(args.turns):
      prompts_BL = draw()
      theirs_BL, theirs_s = _timed(generate, fastest, prompts_BL, args.tokens)
      seconds['transformers'].append(theirs_s)
      for name, engine in engines.items():
        ours_BL, ours_s = _timed(_ours, engine, prompts_BL, args.tokens)
        seconds[name].append(ours_s)
        same[name] += int((ours_BL == theirs_BL).sum())
    over = lambda name: [b / a for a, b in zip(seconds[name], seconds['transformers'], strict=True)]
    found.append(
      {
        'batch': batch,
        'tokens_per_s': {name: tokens / statistics.median(s) for name, s in seconds.items()},
        'ratio': {name: spread(over(name)) for name in engines},
        'same_tokens': {name: same[name] / (tokens * args.turns) for name in engines},
        'acceptance': {name: engine.stats.acceptance for name, engine in engines.items()},
        'experts, threads': fastest,
      }
    )
    print(json.dumps(found[-1]), file=sys.stderr)
  return {'prompt': PROMPT, 'tokens': args.tokens, 'batches': found}


# ---- ours ----------------------------------------------------------------------------------------


def _model(folder: str | None) -> tuple[config.Model, Transformer]:
  if folder:
    loaded = workdir.load(folder)
    return loaded.config.model, loaded.model
  c = flags.load('configs/quickstart.py')
  c.model.mtp_depth = 0
  c = config.freeze(c).model
  return c, jax.jit(lambda key: Transformer(c, key))(jax.random.key(0))


def _decoder(c: config.Model, model: Transformer, devices: int) -> Decoder:
  device_mesh = mesh.make_mesh(config.Mesh(data=devices, zero=0))
  everywhere = NamedSharding(device_mesh, P())
  return Decoder(c, device_mesh, jax.device_put(model, everywhere))


def _name(devices: int, drafts: int) -> str:
  parts = ['engine']
  parts += [f'{devices} devices'] if devices > 1 else []
  parts += [f'{drafts} draft'] if drafts else []
  return ', '.join(parts)


def _ours(engine: Engine, prompts_BL: np.ndarray, tokens: int) -> np.ndarray:
  return np.array(bench_engine.run(engine, [Request(row.tolist(), tokens) for row in prompts_BL]))


# ---- theirs --------------------------------------------------------------------------------------


def _ways() -> list[tuple[str, int]]:
  threads = sorted({1, len(os.sched_getaffinity(0))})
  return list(itertools.product(('grouped_mm', 'batched_mm', 'eager'), threads))


def _transformers(c: config.Model, model: Transformer) -> Callable:
  """((experts, threads), prompts [B, L], tokens) -> new tokens [B, tokens]."""
  import torch
  import transformers

  params = nnx.to_pure_dict(nnx.state(model))
  sizes = bench_transformers.peer_sizes(c) | {'use_cache': True}
  theirs = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**sizes)).float().eval()
  weights = bench_transformers.peer_weights(c, params, params)
  theirs.load_state_dict({name: torch.tensor(weight) for name, weight in weights.items()})
  theirs.generation_config.eos_token_id = None

  def generate(how: tuple[str, int], prompts_BL: np.ndarray, tokens: int) -> np.ndarray:
    theirs.config._experts_implementation, threads = how
    torch.set_num_threads(threads)
    prompts = torch.from_numpy(prompts_BL)
    with torch.inference_mode():
      out = theirs.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
      )
    return out[:, prompts_BL.shape[1] :].numpy()

  return generate


def _timed(run: Callable, *args: Any) -> tuple[Any, float]:
  start = time.perf_counter()
  result = run(*args)
  return result, time.perf_counter() - start
