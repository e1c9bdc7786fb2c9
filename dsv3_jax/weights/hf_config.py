"""`config.json` of a released checkpoint <-> `config.Model`.

Read: DeepSeek-V3 (V3.1 and R1 are the same) and DeepSeek-V2 (Lite too), as their authors wrote it or as
transformers 4 and 5 write it again: `rope_theta` beside `rope_scaling`, or both in `rope_parameters`.
Keys that give tensors their shapes must be there. A key that only sets how they are used, and that the
file leaves out, takes the value of the paper, and `HfModel.notes` says so. What our model cannot compute
the same way is refused, never ignored: biases, tied embeddings, another activation or RoPE.

Written: the form of the releases, which transformers, vLLM and SGLang all read.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from dsv3_jax import config
from dsv3_jax.model import rope

FAMILIES = ('deepseek_v3', 'deepseek_v2')
_ARCHITECTURES = {'deepseek_v3': 'DeepseekV3ForCausalLM', 'deepseek_v2': 'DeepseekV2ForCausalLM'}
_MAX_EXPERTS = 10**7  # in all layers; V3 has 14,848

# Theirs -> ours. The first group gives shapes, and is required.
_SHAPES = {
  'vocab_size': 'vocab_size', 'hidden_size': 'dim', 'intermediate_size': 'ffn_dim',
  'num_hidden_layers': 'num_layers', 'first_k_dense_replace': 'num_dense_layers',
  'num_attention_heads': 'mla.num_heads', 'q_lora_rank': 'mla.q_rank',
  'kv_lora_rank': 'mla.kv_rank', 'qk_nope_head_dim': 'mla.nope_dim',
  'qk_rope_head_dim': 'mla.rope_dim', 'v_head_dim': 'mla.v_dim',
  'n_routed_experts': 'moe.num_experts', 'n_shared_experts': 'moe.num_shared',
  'moe_intermediate_size': 'moe.expert_dim', 'num_experts_per_tok': 'moe.top_k',
  'max_position_embeddings': 'max_length',
}  # fmt: skip
_USES = {
  'num_nextn_predict_layers': 'mtp_depth', 'rms_norm_eps': 'norm_eps',
  'initializer_range': 'init_std', 'n_group': 'moe.num_groups', 'topk_group': 'moe.top_groups',
  'norm_topk_prob': 'moe.normalize', 'routed_scaling_factor': 'moe.route_scale',
}  # fmt: skip
_ROPE = {
  'rope_theta': 'rope.theta', 'factor': 'rope.factor', 'beta_fast': 'rope.beta_fast',
  'original_max_position_embeddings': 'rope.original_length', 'beta_slow': 'rope.beta_slow',
  'mscale': 'rope.mscale', 'mscale_all_dim': 'rope.mscale_all_dim',
}  # fmt: skip
# Where the papers differ: V2 (arXiv 2405.04434, 2.1-2.2, 3.1.2) from V3, whose values are our defaults.
_PAPER_V2 = {
  'mtp_depth': 0, 'moe.num_groups': 8, 'moe.top_groups': 3, 'moe.normalize': False,
  'moe.route_scale': 16.0, 'rope.mscale': 0.707, 'rope.mscale_all_dim': 0.707,
  'moe.dispatch.payload': 'bf16',
}  # fmt: skip
# What the model computes, whatever the family. A key that is not there says the same.
_FIXED: dict[str, tuple[Any, ...]] = {
  'hidden_act': ('silu',), 'attention_bias': (False, None), 'mlp_bias': (False, None),
  'tie_word_embeddings': (False, None), 'moe_layer_freq': (1,),
}  # fmt: skip
_ROUTING = {
  'deepseek_v3': {'scoring_func': ('sigmoid',), 'topk_method': ('noaux_tc',)},
  'deepseek_v2': {
    'scoring_func': ('softmax',),
    'topk_method': ('greedy', 'group_limited_greedy'),
  },
}
_FP8 = {'fmt': ('e4m3',), 'weight_block_size': ([128, 128],), 'scale_fmt': ('ue8m0', None)}


@dataclasses.dataclass(frozen=True)
class HfModel:
  """What a `config.json` says."""

  model: config.Model
  family: str  # 'deepseek_v3' | 'deepseek_v2'
  fp8: bool = False  # matrices are FP8 with scales
  ue8m0: bool = False  # those scales are powers of two
  interleaved: bool = True  # rotary dimensions are adjacent pairs, not two halves
  notes: tuple[str, ...] = ()  # a line per key that the file leaves out and the paper gives


def read(source: str | pathlib.Path | Mapping[str, Any]) -> HfModel:
  """The model of a checkpoint folder, of a `config.json`, or of its values.

  Raises ConfigError naming file, key, value and what would be right.
  """
  if isinstance(source, Mapping):
    return _Reader(source, 'config.json').model()
  path = pathlib.Path(source)
  path = path / 'config.json' if path.is_dir() else path
  try:
    values = json.loads(path.read_text('utf-8'), object_pairs_hook=_once, parse_constant=_no_nan)
  except OSError as e:
    raise config.ConfigError(f'{path}: cannot be read: {e.strerror or e}') from None
  except (ValueError, RecursionError) as e:
    raise config.ConfigError(f'{path}: not JSON: {e or "nested too deeply"}') from None
  if not isinstance(values, dict):
    raise config.ConfigError(f'{path}: holds {type(values).__name__}, must hold a JSON object')
  return _Reader(values, str(path)).model()


def write(
  c: config.Model, *, fp8: bool = False, ue8m0: bool = False, dtype: str = 'bfloat16'
) -> dict[str, Any]:
  """Values of a `config.json` that `read` and transformers read as this model.

  The family follows from the router. Raises ConfigError where no released family computes this model.
  """
  family = 'deepseek_v3' if c.moe.scoring == 'sigmoid' else 'deepseek_v2'
  if family == 'deepseek_v2' and c.moe.normalize:
    raise config.ConfigError(
      'model.moe.normalize = True: must be False to export a softmax router: DeepSeek-V2 has no other'
    )
  if family == 'deepseek_v2' and c.mtp_depth:
    raise config.ConfigError(
      f'model.mtp_depth = {c.mtp_depth}: must be 0 to export a softmax router: DeepSeek-V2 has no MTP'
    )
  if not c.moe.num_shared:
    raise config.ConfigError(
      'model.moe.num_shared = 0: must be positive to export: every release has one'
    )
  flat = config.flatten(c)
  values: dict[str, Any] = {'architectures': [_ARCHITECTURES[family]], 'model_type': family}
  values |= {theirs: flat[ours] for theirs, ours in (_SHAPES | _USES).items()}
  values |= {'q_lora_rank': c.mla.q_rank or None, 'num_key_value_heads': c.mla.num_heads}
  values |= {'rope_theta': c.rope.theta, 'rope_scaling': None, 'rope_interleave': True}
  if c.max_length > c.rope.original_length:
    _check_mscales(c.rope.mscale, c.rope.mscale_all_dim, 'model.rope.')
    yarn = {theirs: flat[ours] for theirs, ours in _ROPE.items() if theirs != 'rope_theta'}
    values['rope_scaling'] = {'type': 'yarn'} | yarn
  grouped = family == 'deepseek_v2' and c.moe.num_groups > 1
  method = 'group_limited_greedy' if grouped else _ROUTING[family]['topk_method'][0]
  values |= {'scoring_func': _ROUTING[family]['scoring_func'][0], 'topk_method': method}
  values |= {key: allowed[0] for key, allowed in _FIXED.items()}
  values |= {'torch_dtype': dtype, 'use_cache': True, 'attention_dropout': 0.0}
  if family == 'deepseek_v2':
    del values['num_nextn_predict_layers'], values['rope_interleave']
  if fp8:
    quantised = {'activation_scheme': 'dynamic', 'fmt': 'e4m3', 'quant_method': 'fp8'}
    quantised |= {'weight_block_size': [128, 128]} | ({'scale_fmt': 'ue8m0'} if ue8m0 else {})
    values['quantization_config'] = quantised
  return values


class _Reader:
  """One pass over the values of a `config.json`; `name` opens every message."""

  def __init__(self, values: Mapping[str, Any], name: str) -> None:
    self.values, self.name = values, name
    self.notes: list[str] = []
    self.flat = config.flatten(config.Model())

  def model(self) -> HfModel:
    family = self.one_of(self.values, 'model_type', FAMILIES)
    if family == 'deepseek_v2':
      self.flat |= _PAPER_V2 | {'moe.scoring': 'softmax'}
    for key, allowed in _FIXED.items():
      if key in self.values:
        self.one_of(self.values, key, allowed)
    self.routing(family)
    for key, ours in _SHAPES.items():
      self.take(self.values, key, ours, required=True)
    for key, ours in _USES.items():
      told = key in self.values or (family, key) != ('deepseek_v2', 'num_nextn_predict_layers')
      if told and key not in ('n_group', 'topk_group'):
        self.take(self.values, key, ours)
    heads = self.values.get('num_key_value_heads')
    if heads is not None and heads != self.flat['mla.num_heads']:
      right = f'equal num_attention_heads = {self.flat["mla.num_heads"]}: MLA shares no heads'
      self.fail('num_key_value_heads', heads, right)
    if family == 'deepseek_v2' and self.flat['mtp_depth']:
      self.fail('num_nextn_predict_layers', self.flat['mtp_depth'], 'be 0: DeepSeek-V2 has no MTP')
    if family == 'deepseek_v2' and self.flat['moe.normalize']:
      # The authors' code then leaves the route scale out, transformers leaves the normalisation out.
      self.fail(
        'norm_topk_prob', True, 'be false: readers of DeepSeek-V2 disagree on what true means'
      )
    self.rope()
    interleaved = self.values.get('rope_interleave', True)
    if type(interleaved) is not bool:
      self.fail('rope_interleave', interleaved, 'be true or false')
    fp8, ue8m0 = self.quantisation()
    model = self.checked()
    return HfModel(model, family, fp8, ue8m0, interleaved, tuple(self.notes))

  def routing(self, family: str) -> None:
    rules = {}
    for key, allowed in _ROUTING[family].items():
      if key in self.values:
        rules[key] = self.one_of(self.values, key, allowed)
      else:
        grouped = (self.values.get('n_group') or 1) != 1
        rules[key] = allowed[-1 if grouped else 0]
        self.note(key, rules[key])
    if rules['topk_method'] == 'greedy':  # groups are not looked at
      self.flat |= {'moe.num_groups': 1, 'moe.top_groups': 1}
      return
    self.take(self.values, 'n_group', 'moe.num_groups')
    self.take(self.values, 'topk_group', 'moe.top_groups')

  def rope(self) -> None:
    """`rope_theta` from any of three places; YaRN from `rope_scaling` or `rope_parameters`."""
    found: dict[str, Any] = {}
    for group in ('rope_scaling', 'rope_parameters'):
      given = self.values.get(group)
      if given is not None and not isinstance(given, Mapping):
        self.fail(group, given, 'be an object or null')
      given = dict(given or {})
      if 'type' in given:  # the older name
        given['rope_type'] = given.get('rope_type', given['type'])
        self.agree(f'{group}.type', given.pop('type'), given['rope_type'])
      for key, value in given.items():
        self.agree(f'{group}.{key}', value, found.setdefault(key, value))
    if 'rope_theta' in self.values:
      theta = self.values['rope_theta']
      self.agree('rope_theta', theta, found.setdefault('rope_theta', theta))
    kind = found.get('rope_type') or ('yarn' if 'factor' in found else 'default')
    if kind not in ('yarn', 'default'):
      self.fail('rope_type', kind, "be 'yarn' or 'default'")
    self.take(found, 'rope_theta', 'rope.theta')
    length = self.flat['max_length']
    if kind == 'default':
      self.flat['rope.original_length'] = max(length, self.flat['rope.original_length'])
      return
    for key, ours in _ROPE.items():
      if key != 'rope_theta':
        self.take(found, key, ours)
    original = self.flat['rope.original_length']
    if length <= original:
      right = f'be above original_max_position_embeddings = {original}, where RoPE is YaRN'
      self.fail('max_position_embeddings', length, right)
    _check_mscales(
      self.flat['rope.mscale'], self.flat['rope.mscale_all_dim'], f'{self.name}: rope '
    )
    self.yarn_extras(found)

  def yarn_extras(self, found: Mapping[str, Any]) -> None:
    """Keys of YaRN that some writers add; they may only say what holds anyway."""
    if not found.get('truncate', True):
      self.fail('truncate', found['truncate'], 'be true: the ramp starts and ends at whole pairs')
    if found.get('partial_rotary_factor', 1.0) not in (1, None):
      self.fail('partial_rotary_factor', found['partial_rotary_factor'], 'be 1')
    given = found.get('attention_factor')
    if given is not None:
      m = lambda key: 0.1 * self.flat[key] * math.log(max(self.flat['rope.factor'], 1)) + 1
      right = m('rope.mscale') / m('rope.mscale_all_dim')
      if type(given) not in (int, float) or not math.isclose(_as_float(given), right, rel_tol=1e-6):
        self.fail('attention_factor', given, f'be {right!r}, as mscale and mscale_all_dim give it')

  def quantisation(self) -> tuple[bool, bool]:
    given = self.values.get('quantization_config')
    if given is None:
      return False, False
    if not isinstance(given, Mapping):
      self.fail('quantization_config', given, 'be an object or null')
    self.one_of(given, 'quant_method', ('fp8',))
    for key, allowed in _FP8.items():
      if key in given:
        self.one_of(given, key, allowed)
    return True, given.get('scale_fmt') == 'ue8m0'

  def checked(self) -> config.Model:
    """Our config of these values; what cannot work is told in their names."""
    sizes = self.flat['num_layers'] * self.flat['moe.num_experts']
    if sizes > _MAX_EXPERTS:
      right = f'be at most {_MAX_EXPERTS} when multiplied with n_routed_experts'
      self.fail('num_hidden_layers', self.flat['num_layers'], right)
    groups = ('', 'mla', 'rope', 'moe', 'moe.dispatch')
    parts: dict[str, dict[str, Any]] = {group: {} for group in groups}
    for key, value in self.flat.items():
      group, _, name = key.rpartition('.')
      parts[group][name] = value
    dispatch = config.Dispatch(**parts['moe.dispatch'])
    mla, moe = config.Mla(**parts['mla']), config.Moe(**parts['moe'], dispatch=dispatch)
    model = config.Model(**parts[''], mla=mla, rope=config.Rope(**parts['rope']), moe=moe)
    whole = config.Config(
      model=model,
      batch=config.Batch(model.max_length, 1, 1, 0.0, 1),
      objective=config.Objective(bias_speed=0.0),  # which every scoring allows
      run=config.Run(total_tokens=1.0),
    )
    try:
      config.check(whole)
    except config.ConfigError as e:
      raise config.ConfigError(_in_their_names(self.name, str(e))) from None
    if model.max_length > model.rope.original_length:
      self.ramp(model)
    return model

  def ramp(self, model: config.Model) -> None:
    """Refuses YaRN whose ramp runs backwards: there readers part."""
    try:
      low, high = rope.yarn_range(model)
    except (ArithmeticError, ValueError):  # beyond what a float holds
      low, high = 1, 0
    if low > high:
      value = model.rope.original_length
      right = f'be larger: the ramp of YaRN would run from pair {low} to pair {high}'
      self.fail('original_max_position_embeddings', value, right)

  # ---- one value ---------------------------------------------------------------------------------

  def take(self, values: Mapping[str, Any], key: str, ours: str, *, required: bool = False) -> None:
    """Sets our key from theirs, or notes the paper's value."""
    absent = key not in values or (values[key] is None and key in ('n_group', 'topk_group'))
    if absent and required:
      raise config.ConfigError(
        f'{self.name}: {key}: not there; a checkpoint cannot be read without it'
      )
    if absent:
      self.note(key, self.flat[ours])
      return
    value, kind = values[key], type(self.flat[ours])
    if value is None and key in ('q_lora_rank', 'n_shared_experts'):
      value = 0
    if kind is float and type(value) is int:
      value = _as_float(value)
    if type(value) is not kind:
      what = {int: 'a whole number', float: 'a number', bool: 'true or false'}[kind]
      self.fail(key, value, f'be {what}')
    if kind is int and not 0 <= value < 2**31:
      self.fail(key, value, 'be from 0 to 2**31 - 1')
    self.flat[ours] = value

  def one_of(self, values: Mapping[str, Any], key: str, allowed: tuple[Any, ...]) -> Any:
    value = values.get(key)
    if not any(type(value) is type(a) and value == a for a in allowed):
      self.fail(key, value, f'be {" or ".join(json.dumps(a) for a in allowed)}')
    return value

  def agree(self, key: str, value: Any, other: Any) -> None:
    if value != other:
      self.fail(key, value, f'be {other!r}, as the same key says elsewhere in the file')

  def note(self, key: str, value: Any) -> None:
    self.notes.append(f'{self.name}: {key}: not there; taken from the paper: {json.dumps(value)}')

  def fail(self, key: str, value: Any, right: str) -> None:
    raise config.ConfigError(f'{self.name}: {key} = {_brief(value)}: must {right}')


def _check_mscales(mscale: float, mscale_all_dim: float, where: str) -> None:
  """Readers agree on YaRN's scales only where both are positive, or are 1 and 0."""
  if mscale > 0 and (mscale_all_dim > 0 or (mscale_all_dim == 0 and mscale == 1)):
    return
  raise config.ConfigError(
    f'{where}mscale = {mscale!r}, mscale_all_dim = {mscale_all_dim!r}: must both be positive, or 1 and '
    '0: readers of these checkpoints disagree on anything else'
  )


def _in_their_names(name: str, message: str) -> str:
  """A message of `config.check` with their keys for ours, on one line per fault."""
  theirs = {f'model.{ours}': key for key, ours in (_SHAPES | _USES | _ROPE).items()}
  theirs['batch.seq_len'] = 'max_position_embeddings'
  for ours in sorted(theirs, key=len, reverse=True):
    message = message.replace(ours, theirs[ours])
  return '\n'.join(f'{name}: {line}' for line in message.splitlines())


def _as_float(value: int | float) -> float:
  """Infinite where a whole number of JSON is beyond every float."""
  return float(value) if abs(value) < 2**1023 else math.inf


def _brief(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 60 else text[:57] + '...'


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  values = dict(pairs)
  if len(values) < len(pairs):
    names = [key for key, _ in pairs]
    twice = next(key for key in names if names.count(key) > 1)
    raise ValueError(f'{_brief(twice)} is there twice')
  return values


def _no_nan(text: str) -> float:
  raise ValueError(f'{text} is no number of JSON')
