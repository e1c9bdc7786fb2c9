"""Trains a model: `python -m dsv3_jax.train --config=configs/quickstart.py --workdir=DIR`.

Every value of the config can be overridden by a flag (`--config.model.num_layers=6`); `:debug` behind
the config's name shrinks it to seconds. The same command again continues an interrupted run, on the
same mesh to the bit. SIGTERM and Ctrl-C save and exit with 0. Several processes, started by `launch/`,
are one run: each reads the rows of its own devices, process 0 alone writes the record and speaks.

`--config.run.init_from=DIR` starts from the weights and the tokenizer of another folder: that of a run, or
of an import (`dsv3_jax/weights/convert.py`).
"""

import contextlib
import functools
import sys
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags as absl_flags
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax import config, counts, flags, mesh, processes, report, runtime
from dsv3_jax.config import ConfigError
from dsv3_jax.data import batches, corpora
from dsv3_jax.data.tokenizer import Tokenizer, load_tokenizer
from dsv3_jax.inference.decode import Decoder
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.inference.stream import TextStream, engine_for, stream
from dsv3_jax.parallel import dispatch
from dsv3_jax.report import ReportError
from dsv3_jax.training import evaluation, schedule, state, workdir
from dsv3_jax.training.checkpoint import Checkpointer, CheckpointError
from dsv3_jax.training.metrics import MetricsError, MetricsWriter, short
from dsv3_jax.training.progress import Progress
from dsv3_jax.training.step import make_step
from dsv3_jax.training.throughput import Throughput

_WORKDIR = absl_flags.DEFINE_string('workdir', None, 'folder of the run; continued if it holds one')
_SAMPLE_TOKENS = 160


class TrainingError(RuntimeError):
  """Training cannot go on; one line."""


def main(c: config.Config, given: flags.Given) -> int:
  """Exit code: 0; 2 for a config that cannot work, 1 for a run that cannot go on, after one line."""
  folder = _WORKDIR.value
  if not folder:
    raise ConfigError(
      '--workdir: is missing; wants a folder for checkpoints, metrics and the report'
    )
  try:
    return train(c, folder, given.name)
  except (CheckpointError, MetricsError, ReportError, TrainingError) as error:
    print(f'train: {error}', file=sys.stderr)
  except OSError as error:
    print(f'train: {error.filename or folder}: {error.strerror}', file=sys.stderr)
  except KeyboardInterrupt:
    print(
      'train: interrupted; the same command continues from the last checkpoint', file=sys.stderr
    )
    return 130
  return 1


def train(c: config.Config, folder: str, name: str) -> int:
  # ---- host --------------------------------------------------------------------------------------
  runtime.keep_freed_memory()
  processes.join()
  device_mesh = mesh.make_mesh(c.mesh)
  first = jax.process_index() == 0
  say = functools.partial(print, flush=True) if first else lambda *_: None
  # ---- data --------------------------------------------------------------------------------------
  corpus = corpora.open_corpus(c.data)
  tokenizer = load_tokenizer(workdir.data_of(c, folder), c.model.vocab_size, corpus)
  mine = mesh.rows_here(device_mesh, c.batch.micro_size)
  data = batches.train_batches(c, corpus, tokenizer, mine=mine)
  heldout = batches.heldout_rows(c, corpus, tokenizer)
  workdir.claim(folder, c)
  platform = device_mesh.devices.flat[0].platform
  devices = f'{device_mesh.size} {platform} device{"s" * (device_mesh.size > 1)}'
  say(f'{name}: {short(counts.parameters(c.model))} parameters, '
      f'{short(counts.active_parameters(c.model, embedding=True))} active per token; {devices}')  # fmt: skip
  say(counts.describe_precision(c.model, c.batch.seq_len))
  say(dispatch.describe(c.model.moe, device_mesh))
  say(batches.describe(corpus, tokenizer))
  # ---- programs ----------------------------------------------------------------------------------
  step_fn = processes.compile_together('step', make_step(c, device_mesh))
  nats = processes.compile_together('evaluation', evaluation.make_nats(c, device_mesh))

  def score(s: state.State) -> evaluation.Evaluation:
    weights = s['params'], s['router_bias']
    rows = c.batch.micro_size * c.mesh.pipe
    return evaluation.evaluate(nats, device_mesh, *weights, heldout, rows)

  with contextlib.ExitStack() as stack:
    stack.callback(data.close)
    # ---- state: the newest good checkpoint, or a new one -----------------------------------------
    checkpointer = stack.enter_context(
      Checkpointer(f'{folder}/{workdir.CHECKPOINTS}', c.checkpoint)
    )
    restored = checkpointer.restore(state.abstract(c, device_mesh))
    if restored:
      train_state, start = restored.state, restored.step
      data.set_state(restored.data_state)
      say(f'continues from checkpoint {start} in {folder}')
    elif c.run.init_from:
      train_state, start = workdir.start_from(c.run.init_from, c, device_mesh), 0
      say(f'starts from the weights in {c.run.init_from}')
    else:
      train_state, start = state.init(c, device_mesh), 0
    if first:  # now that `set_state` has not refused it
      tokenizer.save(f'{folder}/{workdir.TOKENIZER}')
    # ---- record ----------------------------------------------------------------------------------
    total = schedule.total_steps(c)
    speed = Throughput(c)
    metrics = (
      stack.enter_context(contextlib.closing(MetricsWriter(folder, start))) if first else None
    )
    per_step = c.batch.size * c.batch.seq_len
    progress = stack.enter_context(Progress(total, start, per_step)) if first else None
    began = None  # when the device turned to the step that is waited for; None while that compiles

    def finish(s: _Started, evaluate: bool = False) -> None:
      """Waits for a step and records it, with the held-out loss of `train_state` where that is due."""
      nonlocal began
      figures = jax.device_get(s.figures)
      now = time.perf_counter()
      load = figures.pop('load')
      scalars = {key: float(value) for key, value in figures.items()}
      broken = [f'{key} is {value}' for key, value in scalars.items() if not np.isfinite(value)]
      if began is not None:
        scalars['tokens_per_s'] = s.tokens / (now - began)
        scalars['flops_per_s'] = speed.step(s.tokens, now - began)
      if evaluate and not broken:
        result = score(train_state)
        scalars |= {'heldout_loss': result.heldout_loss, 'heldout_bpb': result.bits_per_byte}
      due = s.step % c.run.log_every == 0 or s.step in (1, total) or evaluate or broken
      if metrics and due:
        scalars |= {'tokens': s.seen, 'max_load': load.max(), 'mean_load': load.max(1).mean()}
        metrics.write(s.step, scalars, load)
      if progress:
        progress.update(s.step, loss=scalars['loss'], tokens_per_s=scalars.get('tokens_per_s'))
      if broken:
        raise TrainingError(
          f'{", ".join(broken)} at step {s.step}; the checkpoints in {folder} are kept; a lower '
          'optimizer.peak_lr or model.init_std or another run.seed, in another --workdir, may help'
        )
      began = now

    # ---- steps -----------------------------------------------------------------------------------
    stop = stack.enter_context(processes.Stop(device_mesh))
    step, sequences = start, int(train_state['sequences'])
    started, stopped = None, False
    while step < total and not stopped:
      count = schedule.micro_batches(c.batch, sequences)
      tokens_ABX, count_array = _fetch(c, device_mesh, data, mine, count)
      with jax.transfer_guard('disallow'):
        train_state, figures = step_fn(train_state, tokens_ABX, count_array)
      if started:
        finish(started)  # one step late: the device has its next one by now
      rows = count * c.batch.micro_size
      step, sequences = step + 1, sequences + rows
      started = _Started(step, rows * c.batch.seq_len, sequences * c.batch.seq_len, figures)
      # What wants the state of this step, or an idle device, comes before the next step is started.
      stopped = stop.agreed()
      save_due = step % c.checkpoint.every_steps == 0 or step == total or stopped
      eval_due = c.run.eval_every > 0 and step % c.run.eval_every == 0 and step < total
      dot_due = platform == 'cpu' and step % 20 == 0
      if save_due or eval_due or dot_due:
        finish(started, eval_due)
        started = None
        if save_due:  # after its line is in the record, so that no checkpoint is ahead of that
          checkpointer.save(step, train_state, data.get_state())
        if dot_due:
          speed.time_dot()
        began = time.perf_counter()
  # ---- what came out -------------------------------------------------------------------------------
  if step > start + 1:  # the first one compiles
    say(speed.summary())
  if step < total:
    say(f'stopped by a signal; saved in {folder}; the same command continues')
    return 0
  result = score(train_state)
  if first:
    result.save(folder)
    say(result.table())
  if device_mesh.size == 1:
    say(f'sample:\n{_sample(c, device_mesh, train_state, tokenizer)}')
  if first:
    page = report.draw(folder)
    say(f'{folder} holds config.json, metrics.jsonl, tensorboard/, checkpoints/; report: {page}')
  processes.wait_for_all('report')
  return 0


class _Started(NamedTuple):
  """A step that was handed to the device."""

  step: int
  tokens: int  # of this step
  seen: int  # tokens up to and with it
  figures: dict[str, jax.Array]


def _fetch(
  c: config.Config, device_mesh: jax.sharding.Mesh, data: Any, mine: list[int], count: int
) -> tuple[jax.Array, jax.Array]:
  """`count` micro-batches in a buffer of the full batch's size, and the count, on the devices.

  `data` gives the rows `mine` of each, all that this process's devices hold.
  """
  most = c.batch.size // c.batch.micro_size
  rows = [next(data) for _ in range(count)]
  rows += [np.zeros_like(rows[0])] * (most - count)
  sharding = NamedSharding(device_mesh, P(None, mesh.TOKENS, None))
  shape = (most, c.batch.micro_size, c.batch.seq_len + 1)
  here_AbX = np.stack(rows)
  take = lambda index: here_AbX[:, np.searchsorted(mine, range(shape[1])[index[1]])]
  tokens_ABX = jax.make_array_from_callback(shape, sharding, take)
  everywhere = NamedSharding(device_mesh, P())
  return tokens_ABX, jax.make_array_from_callback((), everywhere, lambda _: np.int32(count))


def _sample(
  c: config.Config, device_mesh: jax.sharding.Mesh, train_state: state.State, tokenizer: Tokenizer
) -> str:
  """The prompt and what the model makes of it."""
  weights = train_state.get('ema', train_state['params'])
  model = state.layout(c).module(weights, train_state['router_bias'])
  decoder = Decoder(c.model, device_mesh, model)
  prompt = [tokenizer.bos_id, *tokenizer.encode(c.run.prompt)]
  text = TextStream(tokenizer)
  sampling = Sampling(temperature=0.7, top_p=0.9, seed=c.run.seed)
  engine = engine_for(decoder, tokenizer, [prompt], max_tokens=_SAMPLE_TOKENS)
  steps = stream(engine, [prompt], sampling=sampling, max_tokens=_SAMPLE_TOKENS)
  pieces = [text.push(token) for (tokens,) in steps for token in tokens]
  return c.run.prompt + ''.join(pieces) + text.close()


if __name__ == '__main__':
  runtime.log_warnings_only()
  flags.run(main)
