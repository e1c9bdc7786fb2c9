"""A run's folder: what lies in it, to whom it belongs, and the model that it holds.

config.json      the config of the run, by `claim`
tokenizer.json   the tokenizer that its data was made with
checkpoints/     one folder per checkpoint, by `training.checkpoint`
metrics.jsonl    the record, by `training.metrics`
weights/         in place of those two: imported weights, by `weights.store`
"""

import dataclasses
import json
import os
import pathlib

import jax
import jax.numpy as jnp

from dsv3_jax import config, mesh
from dsv3_jax.config import ConfigError
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.precision import recipe
from dsv3_jax.training import state
from dsv3_jax.training.checkpoint import Checkpointer
from dsv3_jax.weights import scales, store

CONFIG = 'config.json'
TOKENIZER = 'tokenizer.json'
CHECKPOINTS = 'checkpoints'
WEIGHTS = 'weights'

# A resumed run may change these: where and how it computes, how long, what it shows and keeps. Groups
# end in a dot.
_FREE = (
  'mesh.', 'pipeline.', 'checkpoint.', 'run.log_every', 'run.eval_every', 'run.eval_bytes', 'run.prompt',
  'run.total_tokens', 'data.workers', 'data.cache_dir', 'model.remat', 'model.unroll', 'model.dual_batch',
  'model.moe.dispatch.form', 'model.moe.dispatch.capacity',
)  # fmt: skip
# What a model may be started with other values of: none of them says what a weight is or does.
_FREE_OF_MODEL = (
  'precision', 'remat', 'unroll', 'dual_batch', 'init_std', 'max_length', 'mla.block', 'moe.dispatch.',
)  # fmt: skip
_WANTS_RUN = 'wants the --workdir of a training run'
_ONE_DEVICE = config.Mesh(zero=0)


@dataclasses.dataclass(frozen=True)
class Loaded:
  config: config.Config  # of the run, on the mesh it was loaded on
  model: Transformer
  tokenizer: Tokenizer
  step: int | None  # of the checkpoint; None for imported weights

  @property
  def name(self) -> str:
    """Of what was loaded, for a line that a person reads."""
    return 'imported weights' if self.step is None else f'checkpoint {self.step}'


def claim(workdir: str | os.PathLike[str], c: config.Config) -> None:
  """Makes the folder if needed and writes its config.json; the first process of a run does it.

  A folder with another config is left alone: ConfigError names each key that differs and would change
  what the run computes. Where only other keys differ, the new config replaces the old one.
  """
  workdir = pathlib.Path(workdir)
  if jax.process_index() != 0:
    return
  if (workdir / CONFIG).exists():
    changed = [d for d in config.differences(read_config(workdir), c) if not d.startswith(_FREE)]
    if changed:
      listed = '\n'.join(f'  {line}' for line in changed)
      raise ConfigError(
        f'--workdir={workdir} holds a run of another config:\n{listed}\n'
        'use another --workdir, or the old values to continue that run'
      )
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    new = workdir / f'.{CONFIG}.partial'  # whole or not at all; what a kill leaves is overwritten
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

  Imported weights come in the dtypes they are computed with, 2 bytes a parameter under 'bf16', and each
  device reads only its own.

  Raises:
    ConfigError: the folder, its config or its tokenizer is missing or cannot be used, it has no
      checkpoint, the run keeps no average, or imported weights are damaged.
    CheckpointError: no checkpoint is usable, or there is none of `step`.
  """
  workdir = pathlib.Path(workdir)
  if not workdir.is_dir():
    raise ConfigError(f'{workdir}: no such folder; {_WANTS_RUN}')
  c = _on(read_config(workdir), sizes)
  imported = (workdir / WEIGHTS).exists()
  if imported and (average or step is not None):
    asked = '--average' if average else f'--step={step}'
    raise ConfigError(f'{asked}: {workdir} holds imported weights, which have neither')
  if average and not c.optimizer.ema_decay:
    raise ConfigError(
      f'{workdir}: its run keeps no average of the weights (optimizer.ema_decay = 0)'
    )
  tokenizer = _read_tokenizer(workdir, c)
  abstract = state.abstract(c, mesh.make_mesh(c.mesh))
  if imported:
    found, step = _read_weights(workdir, c.model, _computed(c.model, abstract)), None
  else:
    found, step = _read_checkpoint(workdir, c, abstract, step)
  model = state.layout(c).module(found['ema' if average else 'params'], found['router_bias'])
  return Loaded(c, model, tokenizer, step)


def start_from(
  workdir: str | os.PathLike[str], c: config.Config, device_mesh: jax.sharding.Mesh
) -> state.State:
  """A fresh state on this mesh whose weights and router biases are those of another folder.

  The folder is an import, or a run, of which the newest checkpoint is taken.

  Raises:
    ConfigError: there are no weights, or they are of another model: a line for each key that differs.
    CheckpointError: no checkpoint is usable.
  """
  workdir = pathlib.Path(workdir)
  own = _same_model(workdir, c)
  fresh = state.init(c, device_mesh)
  fresh = {key: x for key, x in fresh.items() if key not in ('params', 'router_bias', 'ema')}
  like = dataclasses.replace(
    c, optimizer=own.optimizer
  )  # which says what else its checkpoints hold
  abstract = state.abstract(like, device_mesh)
  if (workdir / WEIGHTS).exists():
    found = _read_weights(workdir, c.model, abstract)
  else:
    found, _ = _read_checkpoint(workdir, like, abstract)
  fresh |= {key: found[key] for key in ('params', 'router_bias')}
  if c.optimizer.ema_decay:
    fresh['ema'] = jax.tree.map(jnp.copy, fresh['params'])  # a step donates both
  return fresh


def data_of(c: config.Config, workdir: str | os.PathLike[str]) -> config.Data:
  """The run's data, with the tokenizer that its first weights were made with.

  Raises:
    ConfigError: `run.init_from` is no folder of this model, or has no tokenizer and none is given.
  """
  if not c.run.init_from or c.data.tokenizer:
    return c.data
  own = pathlib.Path(workdir, TOKENIZER)
  if not own.exists():  # it is there when a run goes on
    start = pathlib.Path(c.run.init_from)
    _same_model(start, c)
    own = start / TOKENIZER
    if not own.exists():
      given = f'run.init_from = {c.run.init_from!r}'
      raise ConfigError(f'{given}: has no {TOKENIZER}; give the file as data.tokenizer')
  return dataclasses.replace(c.data, tokenizer=str(own))


def _same_model(workdir: pathlib.Path, c: config.Config) -> config.Config:
  """The config of a folder that a run may start from; raises ConfigError where the model is another."""
  given = f'run.init_from = {str(workdir)!r}'
  if not workdir.is_dir():
    raise ConfigError(f'{given}: no such folder; wants an imported model or the folder of a run')
  own = read_config(workdir)
  theirs, ours = config.flatten(own.model), config.flatten(c.model)
  yarn = own.model.max_length > own.model.rope.original_length
  if not yarn:  # then the plain frequencies are all there is to the rotary embedding
    theirs = {k: v for k, v in theirs.items() if not k.startswith('rope.') or k == 'rope.theta'}
  faults = [
    f'model.{key} = {ours[key]!r}: must be {value!r}, as in {given}'
    for key, value in theirs.items()
    if not key.startswith(_FREE_OF_MODEL) and ours[key] != value
  ]
  original = c.model.rope.original_length
  if yarn != (c.model.max_length > original):
    right = f'be {"above" if yarn else "at most"} model.rope.original_length = {original}'
    faults.append(
      f'model.max_length = {c.model.max_length}: must {right}: {given} has YaRN {"on" if yarn else "off"}'
    )
  if faults:
    raise ConfigError('\n'.join(faults))
  return own


def _read_weights(workdir: pathlib.Path, m: config.Model, abstract: state.State) -> state.State:
  """Imported weights, of the dtypes and shardings of a state."""
  weights = store.open(workdir / WEIGHTS)
  wanted = {key: abstract[key] for key in ('params', 'router_bias')}
  return weights.load(wanted, scales.reader(weights, m) if weights.fp8 else None)


def _read_checkpoint(
  workdir: pathlib.Path, c: config.Config, abstract: state.State, step: int | None = None
) -> tuple[state.State, int]:
  with Checkpointer(workdir / CHECKPOINTS, c.checkpoint) as checkpointer:
    restored = checkpointer.restore(abstract, step=step)
  if restored is None:
    raise ConfigError(
      f'{workdir}: has no checkpoint yet; the run writes one every {c.checkpoint.every_steps} steps'
    )
  return restored.state, restored.step


def _computed(m: config.Model, abstract: state.State) -> state.State:
  """The same shapes with matrices in the dtype that they are multiplied in; the router stays FP32."""
  dtype = recipe.compute_dtype(m.precision)

  def one(path: tuple, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    name = mesh.path_names(path)[-1]
    is_cast = len(name.rpartition('_')[2]) > 1 and name != 'router_DE'
    return jax.ShapeDtypeStruct(x.shape, dtype if is_cast else jnp.float32, sharding=x.sharding)

  return abstract | {'params': jax.tree_util.tree_map_with_path(one, abstract['params'])}


def _on(c: config.Config, sizes: config.Mesh) -> config.Config:
  """`c` on another mesh. Not all of `config.check`: how a training batch is split matters no more."""
  ways = sizes.node * sizes.local
  if c.model.moe.num_experts % ways:
    raise ConfigError(
      f'mesh.node * mesh.local = {ways}: must divide model.moe.num_experts = {c.model.moe.num_experts}'
    )
  if sizes.pipe != 1:
    raise ConfigError(f'mesh.pipe = {sizes.pipe}: must be 1: stages are for training')
  # Rows may come in any number now, and whoever loads a model trains on none of them.
  return dataclasses.replace(c, mesh=sizes, model=dataclasses.replace(c.model, dual_batch=False))


def read_config(workdir: str | os.PathLike[str]) -> config.Config:
  """The config of a run or an import; raises ConfigError where there is none that can be used."""
  path = pathlib.Path(workdir, CONFIG)
  try:
    return config.from_json(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    raise ConfigError(f'{workdir}: has no {CONFIG}; {_WANTS_RUN}') from None
  except OSError as error:
    raise ConfigError(f'{path}: cannot be read: {error.strerror}') from None
  except (UnicodeDecodeError, json.JSONDecodeError) as error:
    raise ConfigError(f'{path}: is not JSON: {error}') from None
  except ConfigError as error:
    reason = '; '.join(str(error).splitlines())
    if _is_released(path):
      reason = (
        'but of a released model; import that: python -m dsv3_jax.weights.convert import '
        f'{workdir} NEW_WORKDIR'
      )
    raise ConfigError(f'{path}: is not the config of a run: {reason}') from None


def _is_released(path: pathlib.Path) -> bool:
  """Whether a config.json is one of transformers."""
  values = json.loads(path.read_text(encoding='utf-8'))
  return isinstance(values, dict) and 'model_type' in values


def _read_tokenizer(workdir: pathlib.Path, c: config.Config) -> Tokenizer:
  path = workdir / TOKENIZER
  try:
    tokenizer = Tokenizer(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    imported = (workdir / WEIGHTS).exists()
    right = 'its weights came without one; put it there' if imported else _WANTS_RUN
    raise ConfigError(f'{workdir}: has no {TOKENIZER}; {right}') from None
  except Exception as error:  # the tokenizers package raises nothing narrower
    raise ConfigError(f'{path}: cannot be used as a tokenizer: {error}') from None
  if tokenizer.vocab_size > c.model.vocab_size:
    raise ConfigError(
      f'{path}: has {tokenizer.vocab_size} tokens, more than model.vocab_size = {c.model.vocab_size}'
    )
  return tokenizer
