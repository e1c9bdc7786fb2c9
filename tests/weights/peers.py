"""What the comparisons with other implementations share: random models, both sides' logits.

Everything that needs torch or transformers imports it inside: the recorded fixtures do without.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import parity

from dsv3_jax import config
from dsv3_jax.weights import transfer

FIXTURES = pathlib.Path(__file__).parent / 'fixtures'
# {folder: (family, seed of random_model)}; test_parity.py compares, and writes them where it is asked to.
RECORDED = {
  'v3_groups_yarn': ('deepseek_v3', 1),
  'v2_groups_yarn': ('deepseek_v2', 1),
  'v2_plain_queries': ('deepseek_v2', 0),
}

# ---- random models -------------------------------------------------------------------------------


def random_model(seed: int, family: str) -> config.Model:
  """A tiny model of a family, every size drawn; `seed` itself picks what every dozen must have of all.

  transformers views the rotary dimensions of V2 as complex numbers, for which the strides must be even:
  an odd latent or an odd head without position fails there, so V2 gets even ones.
  """
  rng = np.random.default_rng(seed)
  pick = lambda *values: values[rng.integers(len(values))]
  heads, experts = pick(2, 3, 4), pick(8, 12)
  v3 = family == 'deepseek_v3'
  mla = config.Mla(
    num_heads=heads,
    q_rank=pick(11, 16) if seed % 7 % 3 else 0,
    kv_rank=pick(9, 15) if v3 else pick(10, 18),
    nope_dim=pick(5, 7, 8) if v3 else pick(6, 10),
    rope_dim=pick(2, 4, 6, 10),
    v_dim=pick(3, 6, 9),
    block=16,
  )
  rope = config.Rope(
    theta=pick(100.0, 10_000.0),
    factor=pick(4.0, 40.0),
    original_length=16,
    beta_fast=pick(4.0, 32.0),
    mscale=pick(0.707, 1.0, 1.3),
    mscale_all_dim=pick(0.4, 0.707, 1.0),
  )
  groups = pick(2, 4) if seed % 2 else 1
  kept = pick(1, groups // 2) if groups > 1 else 1
  moe = config.Moe(
    num_experts=experts,
    num_shared=1 + seed % 3,
    top_k=min(pick(2, 3, 4), kept * experts // groups),
    expert_dim=pick(5, 12),
    num_groups=groups,
    top_groups=kept,
    scoring='sigmoid' if v3 else 'softmax',
    normalize=v3 and bool(seed % 5),
    route_scale=pick(1.0, 2.5, 16.0),
    dispatch=config.Dispatch(payload='fp8' if v3 else 'bf16'),
  )
  dense = seed % 4 % 3
  return config.Model(
    vocab_size=int(rng.integers(40, 90)),
    dim=heads * pick(8, 11),
    ffn_dim=pick(17, 24),
    num_layers=dense + pick(1, 2),
    num_dense_layers=dense,
    mtp_depth=0,
    max_length=64 if seed % 4 < 3 else 16,
    precision='fp32',
    remat='none',
    mla=mla,
    rope=rope,
    moe=moe,
  )


def tokens(m: config.Model, seed: int = 0) -> np.ndarray:
  """int32 [2, L]; beyond the original length where YaRN is on."""
  length = 24 if m.max_length > m.rope.original_length else 15
  return np.random.default_rng(seed).integers(0, m.vocab_size, (2, length), np.int32)


# ---- our side ------------------------------------------------------------------------------------


def as_computed(m: config.Model) -> config.Model:
  """A model as read from a config, set to compute in FP32 as the peers do here."""
  return dataclasses.replace(
    m, precision='fp32', remat='none', mla=dataclasses.replace(m.mla, block=16)
  )


def random_tree(m: config.Model, seed: int) -> dict[str, Any]:
  state = parity.random_state(config.Config(model=m), seed)
  return {name: state[name] for name in ('params', 'router_bias')}


@functools.cache
def _program(m: config.Model) -> Any:
  layout = parity.layout(config.Config(model=m))

  def forward(params: Any, router_bias: Any, tokens_BL: jax.Array) -> tuple[jax.Array, list]:
    model = layout.module(params, router_bias)
    embed_BLD = model.embed(m, tokens_BL)
    hidden_BLD, _ = model.hidden(m, embed_BLD)
    further = model.predict_further(m, hidden_BLD, embed_BLD)[0] if m.mtp_depth else []
    return hidden_BLD @ model.head_DV[...], [x @ model.head_DV[...] for x in further]

  return parity.on_one_device(forward)


def logits(
  m: config.Model, tree: dict[str, Any], tokens_BL: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
  """[B, L, V] of the main model, and of every MTP depth."""
  main, further = _program(m)(tree['params'], tree['router_bias'], tokens_BL)
  return np.asarray(main), [np.asarray(x) for x in further]


def cross_entropy_gradients(m: config.Model, tree: dict[str, Any], tokens_BL: np.ndarray) -> Any:
  """Gradients of the mean of -log p(next token), like params."""
  layout = parity.layout(config.Config(model=m))

  def loss(params: Any, router_bias: Any, tokens_BL: jax.Array) -> jax.Array:
    model = layout.module(params, router_bias)
    hidden_BLD, _ = model.hidden(m, model.embed(m, tokens_BL))
    log_BLV = jax.nn.log_softmax(hidden_BLD @ model.head_DV[...])[:, :-1]
    return -jnp.mean(jnp.take_along_axis(log_BLV, tokens_BL[:, 1:, None], axis=2))

  return parity.on_one_device(jax.grad(loss))(tree['params'], tree['router_bias'], tokens_BL)


# ---- a released layout, made without our table ---------------------------------------------------


def released(m: config.Model, w: oracle.Weights) -> dict[str, np.ndarray]:
  """The oracle's weights under released names and in released shapes, spelled out tensor by tensor."""
  out: dict[str, np.ndarray] = {}
  E, F, H, N = m.moe.num_experts, m.moe.expert_dim, m.mla.nope_dim, m.mla.num_heads

  def attention(at: str, a: Any) -> None:
    per_head = lambda x: np.concatenate([x[:, n].T for n in range(N)])
    if m.mla.q_rank:
      out[at + 'q_a_proj.weight'] = a['q_down_DQ'].T
      out[at + 'q_a_layernorm.weight'] = a['q_norm_Q']
      out[at + 'q_b_proj.weight'] = per_head(a['q_up_QNJ'])
    else:
      out[at + 'q_proj.weight'] = per_head(a['q_DNJ'])
    out[at + 'kv_a_proj_with_mqa.weight'] = np.concatenate([a['kv_down_DC'].T, a['k_rope_DR'].T])
    out[at + 'kv_a_layernorm.weight'] = a['kv_norm_C']
    heads = [part[:, n].T for n in range(N) for part in (a['k_up_CNH'], a['v_up_CNV'])]
    assert heads[0].shape == (H, m.mla.kv_rank)
    out[at + 'kv_b_proj.weight'] = np.concatenate(heads)
    out[at + 'o_proj.weight'] = np.concatenate(list(a['out_NVD'])).T

  def ffn(at: str, gate: Any, up: Any, down: Any) -> None:
    for name, x in (('gate_proj', gate), ('up_proj', up), ('down_proj', down)):
      out[f'{at}{name}.weight'] = x.T

  def block(at: str, b: Any) -> None:
    out[at + 'input_layernorm.weight'] = b['attn_norm_D']
    attention(at + 'self_attn.', b['attn'])
    out[at + 'post_attention_layernorm.weight'] = b['ffn_norm_D']
    f, at = b['ffn'], at + 'mlp.'
    if 'router_DE' not in f:
      return ffn(at, f['gate_DF'], f['up_DF'], f['down_FD'])
    out[at + 'gate.weight'] = f['router_DE'].T
    if m.moe.scoring == 'sigmoid':
      out[at + 'gate.e_score_correction_bias'] = f['bias_E']
    for e in range(E):
      ffn(f'{at}experts.{e}.', f['gate_EDF'][e], f['up_EDF'][e], f['down_EFD'][e])
    shared = f['shared']
    assert shared['gate_DF'].shape == (m.dim, m.moe.num_shared * F)
    ffn(at + 'shared_experts.', shared['gate_DF'], shared['up_DF'], shared['down_FD'])
    return None

  out['model.embed_tokens.weight'] = w['embed_VD']
  for i, b in enumerate([*w['dense_layers'], *w['moe_layers']]):
    block(f'model.layers.{i}.', b)
  out['model.norm.weight'] = w['final_norm_D']
  out['lm_head.weight'] = w['head_DV'].T
  for i, module in enumerate(w['mtp'], start=m.num_layers):
    at = f'model.layers.{i}.'
    block(at, module['block'])
    out[at + 'enorm.weight'], out[at + 'hnorm.weight'] = (
      module['embed_norm_D'],
      module['hidden_norm_D'],
    )
    # [embedding ; hidden]: the oracle multiplies the embedding with the first rows.
    out[at + 'eh_proj.weight'] = module['proj_DD'].T
    out[at + 'shared_head.norm.weight'] = module['out_norm_D']
    out[at + 'embed_tokens.weight'], out[at + 'shared_head.head.weight'] = (
      w['embed_VD'],
      w['head_DV'].T,
    )
  return {name: np.ascontiguousarray(x, np.float32) for name, x in out.items()}


def read_tree(source: transfer.Released) -> dict[str, Any]:
  """Our tree of an opened checkpoint that is as its config says."""
  assert source.findings().lines == []
  return transfer.tree(source.hf.model, source.read)


# ---- transformers --------------------------------------------------------------------------------


def peer(values: dict[str, Any]) -> Any:
  """A model of transformers, eager and in float32, from the values of a config.json."""
  import transformers

  name = values['architectures'][0]
  kind = getattr(transformers, name.replace('ForCausalLM', 'Config'))
  values = {k: v for k, v in values.items() if k not in ('architectures', 'model_type')}
  c = kind(**values, attn_implementation='eager', experts_implementation='eager')
  return getattr(transformers, name)(c).eval()


def load_peer(folder: pathlib.Path, architecture: str, **how: Any) -> tuple[Any, dict]:
  """`from_pretrained`, which must find every tensor it wants; and what it tells about the others."""
  import torch
  import transformers

  model, info = getattr(transformers, architecture).from_pretrained(
    folder,
    dtype=torch.float32,
    attn_implementation='eager',
    experts_implementation='eager',
    output_loading_info=True,
    **how,
  )
  assert not info['missing_keys'] and not info['mismatched_keys'], info
  return model.eval(), info


def randomise(model: Any, seed: int) -> None:
  """Weights of the size of training, norms around 1, biases that reorder experts."""
  import torch

  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, x in model.state_dict().items():
      x.copy_(torch.randn(x.shape, generator=generator))
      if name.endswith('e_score_correction_bias'):
        x.mul_(0.1)
      elif x.ndim == 1:
        x.mul_(0.1).add_(1)
      elif 'embed_tokens' not in name:
        x.mul_(x.shape[-1] ** -0.5)


def peer_logits(model: Any, tokens_BL: np.ndarray) -> np.ndarray:
  import torch

  with torch.no_grad():
    return model(torch.from_numpy(tokens_BL).long(), use_cache=False).logits.numpy()


def save(export: transfer.Export, folder: pathlib.Path) -> pathlib.Path:
  """An export as one file, written by the safetensors library."""
  from safetensors.numpy import save_file

  folder.mkdir()
  save_file(dict(transfer.exported(export)), folder / 'model.safetensors', {'format': 'pt'})
  (folder / 'config.json').write_text(json.dumps(export.config))
  return folder
