"""Configuration: a ConfigDict in, a checked `Config` out.

`default()` gives the report's values (`schema.py`) as a mutable ml_collections ConfigDict, which `configs/*.py` edit
and flags override; `freeze(config_dict)` turns it back, once, into a `Config` and refuses what
cannot work (unknown keys, wrong types, what `limits.py` finds) before anything is compiled or
written. Below that line nobody sees a ConfigDict: mutated after use as a static argument it
silently reuses the old compilation.
"""

import dataclasses
import difflib
import json
from collections.abc import Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from dsv3_jax.limits import check
from dsv3_jax.schema import (
  Batch,
  Checkpoint,
  Config,
  ConfigError,
  Data,
  Dispatch,
  Mesh,
  Mla,
  Model,
  Moe,
  Objective,
  Optimizer,
  Pipeline,
  Rope,
  Run,
  flatten,
)

__all__ = [
  'Batch',
  'Checkpoint',
  'Config',
  'ConfigError',
  'Data',
  'Dispatch',
  'Mesh',
  'Mla',
  'Model',
  'Moe',
  'Objective',
  'Optimizer',
  'Pipeline',
  'Rope',
  'Run',
  'check',
  'check_key',
  'debug',
  'default',
  'differences',
  'flatten',
  'freeze',
  'from_json',
  'to_json',
  'variant',
]

_KINDS = {int: 'a whole number', float: 'a number', str: 'a string', bool: 'True or False'}


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
