"""A run's folder: what lies in it, to whom it belongs, and the model that it holds.

config.json      the config of the run, by `claim`
tokenizer.json   the tokenizer that its data was made with
checkpoints/     one folder per checkpoint, by `training.checkpoint`
metrics.jsonl    the record, by `training.metrics`
"""

import dataclasses
import json
import os
import pathlib
import tempfile

import jax

from dsv3_jax import config, mesh
from dsv3_jax.config import ConfigError
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.training import state
from dsv3_jax.training.checkpoint import Checkpointer

CONFIG = 'config.json'
TOKENIZER = 'tokenizer.json'
CHECKPOINTS = 'checkpoints'
METRICS = 'metrics.jsonl'

# A resumed run may change these: where and how it computes, how long, what it shows and keeps. Groups
# end in a dot.
_FREE = (
  'mesh.', 'checkpoint.', 'run.log_every', 'run.eval_every', 'run.eval_bytes', 'run.prompt',
  'run.total_tokens', 'data.workers', 'data.cache_dir', 'model.remat', 'model.unroll', 'model.moe.dispatch',
)  # fmt: skip
_ONE_DEVICE = config.Mesh(zero=0)


@dataclasses.dataclass(frozen=True)
class Loaded:
  config: config.Config  # of the run, on the mesh it was loaded on
  model: Transformer
  tokenizer: Tokenizer
  step: int  # of the checkpoint


def claim(workdir: str | os.PathLike[str], c: config.Config) -> None:
  """Makes the folder if needed and writes its config.json; the first process of a run does it.

  A folder with another config is left alone: ConfigError names each key that differs and would change
  what the run computes. Where only other keys differ, the new config replaces the old one.
  """
  workdir = pathlib.Path(workdir)
  if jax.process_index() != 0:
    return
  if (workdir / CONFIG).exists():
    changed = [d for d in config.differences(_read_config(workdir), c) if not d.startswith(_FREE)]
    if changed:
      listed = '\n'.join(f'  {line}' for line in changed)
      raise ConfigError(
        f'--workdir={workdir} holds a run of another config:\n{listed}\n'
        'use another --workdir, or the old values to continue that run'
      )
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=workdir) as folder:  # whole or not at all
      new = pathlib.Path(folder, CONFIG)
      new.write_text(config.to_json(c), encoding='utf-8')
      new.replace(workdir / CONFIG)
  except OSError as error:
    raise ConfigError(f'--workdir={workdir}: cannot be written: {error.strerror}') from None


def load(
  workdir: str | os.PathLike[str],
  *,
  step: int | None = None,
  average: bool = False,
  sizes: config.Mesh = _ONE_DEVICE,
) -> Loaded:
  """The model of the newest checkpoint that is whole, or of the one of `step`, on a mesh of `sizes`.

  `average` takes the average of the weights. The folder may be one that a run is writing to. The whole
  state is read, and what is not asked for dropped: count on 14 bytes a parameter with BF16 moments and
  an average.

  Raises:
    ConfigError: the folder, its config or its tokenizer is missing or cannot be used, it has no
      checkpoint, or the run keeps no average.
    CheckpointError: no checkpoint is usable, or there is none of `step`.
  """
  workdir = pathlib.Path(workdir)
  if not workdir.is_dir():
    raise ConfigError(f'{workdir}: no such folder; wants the --workdir of a training run')
  c = _on(_read_config(workdir), sizes)
  if average and not c.optimizer.ema_decay:
    raise ConfigError(
      f'{workdir}: its run keeps no average of the weights (optimizer.ema_decay = 0)'
    )
  tokenizer = _read_tokenizer(workdir, c)
  abstract = state.abstract(c, mesh.make_mesh(c.mesh))
  with Checkpointer(workdir / CHECKPOINTS, c.checkpoint) as checkpointer:
    restored = checkpointer.restore(abstract, step=step)
  if restored is None:
    raise ConfigError(
      f'{workdir}: has no checkpoint yet; the run writes one every {c.checkpoint.every_steps} steps'
    )
  params = restored.state['ema' if average else 'params']
  model = state.layout(c).module(params, restored.state['router_bias'])
  return Loaded(c, model, tokenizer, restored.step)


def _on(c: config.Config, sizes: config.Mesh) -> config.Config:
  """`c` on another mesh. Not all of `config.check`: how a training batch is split matters no more."""
  ways = sizes.node * sizes.local
  if c.model.moe.num_experts % ways:
    raise ConfigError(
      f'mesh.node * mesh.local = {ways}: must divide model.moe.num_experts = {c.model.moe.num_experts}'
    )
  if sizes.pipe != 1:
    raise ConfigError(f'mesh.pipe = {sizes.pipe}: must be 1: layers are not split over devices yet')
  return dataclasses.replace(c, mesh=sizes)


def _read_config(workdir: pathlib.Path) -> config.Config:
  path = workdir / CONFIG
  try:
    return config.from_json(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    raise ConfigError(
      f'{workdir}: has no {CONFIG}; wants the --workdir of a training run'
    ) from None
  except OSError as error:
    raise ConfigError(f'{path}: cannot be read: {error.strerror}') from None
  except (UnicodeDecodeError, json.JSONDecodeError) as error:
    raise ConfigError(f'{path}: is not JSON: {error}') from None
  except ConfigError as error:
    reason = '; '.join(str(error).splitlines())
    raise ConfigError(f'{path}: is not the config of a run: {reason}') from None


def _read_tokenizer(workdir: pathlib.Path, c: config.Config) -> Tokenizer:
  path = workdir / TOKENIZER
  try:
    tokenizer = Tokenizer(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    raise ConfigError(
      f'{workdir}: has no {TOKENIZER}; wants the --workdir of a training run'
    ) from None
  except Exception as error:  # the tokenizers package raises nothing narrower
    raise ConfigError(f'{path}: cannot be used as a tokenizer: {error}') from None
  if tokenizer.vocab_size > c.model.vocab_size:
    raise ConfigError(
      f'{path}: has {tokenizer.vocab_size} tokens, more than model.vocab_size = {c.model.vocab_size}'
    )
  return tokenizer
