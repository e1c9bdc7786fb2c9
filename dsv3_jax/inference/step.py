"""One step of generation over the paged latent cache, on one device of a mesh: forward, choice, drafts.

  1. The main model runs L tokens of every row at positions start .. start + count - 1: a chunk of a
     prompt, or the last token of a sequence and the drafts behind it.
  2. What follows each of them is chosen from its logits. A draft is accepted where it is what was chosen
     behind the token before it, so the tokens of a sequence are the ones that plain decoding would
     choose, greedy or drawn: the choice looks at the main model, the seed and the position alone.
  3. The MTP module (2.2) runs the accepted positions on the main model's hidden states and the tokens
     chosen behind them, and drafts what comes next. Drafts further ahead come from the module run again
     on its own output, behind its norm, at the next position (its cache entry there is overwritten once
     the token is known).

Prompts and decoding are the same function at two shapes. Attention is absorbed in both. Sequences are
split over (`data`, `node`, `local`), each row's pages lie on its device, routed experts are split over
(`node`, `local`); all other weights are whole on every device. Rows beyond `count` compute on what
stands there and leave nothing behind.

`several` takes many steps of decoding at once: what a step chose goes on on the device, and the host, which
costs a small model as much as its step, is asked once for all of them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax import compat, config, mesh
from dsv3_jax.inference import layer
from dsv3_jax.inference.cache import Cache
from dsv3_jax.inference.sampling import Samplings, sample
from dsv3_jax.inference.served import Drafter, Served
from dsv3_jax.model.layers import rms_norm
from dsv3_jax.model.moe import Slots

TOP = 20  # most probable tokens that can be told beside the chosen one, as the OpenAI API has it


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
  """What a step runs."""

  tokens_BL: jax.Array
  start_B: jax.Array  # position of the first of them
  count_B: jax.Array  # of them that are there; 0: an empty row
  table_BJ: jax.Array  # pages on the row's own device
  next_B: jax.Array  # of prompts: the token behind the last of them, or -1 where it is to be chosen
  samplings: Samplings
  top: jax.Array  # bool []: whether anybody asks for the most probable tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chosen:
  """What came of it. Of prompts, L is 1: behind the last token of the chunk."""

  tokens_BL: jax.Array  # int32: chosen behind each token
  accepted_B: jax.Array  # int32: drafts that were right; so many and one more of the tokens count
  drafts_BK: jax.Array  # int32: of the tokens behind those
  logprob_BL: jax.Array  # float32, of the model as it is, whatever the temperature
  top_ids_BLT: jax.Array
  top_logprobs_BLT: jax.Array
  load_YE: jax.Array  # int32: how many of all rows' tokens chose each expert, in every MoE layer


@dataclasses.dataclass(frozen=True)
class How:
  """What a program is compiled for, besides shapes."""

  prompt: bool
  drafts: int
  vocab_size: int  # tokens below it can be chosen
  eos_ids: tuple[int, ...] = ()  # `several` stops a row behind one of them
  most: int = 1  # steps that `several` can take
  dual_batch: bool = False  # rows go through layers as two halves out of step (`model.dual`)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Several:
  """What came of several steps, which stand in front of all but the drafts and the loads."""

  chosen: Chosen  # drafts of the last step; loads of all together
  count_SB: jax.Array  # int32: tokens that a row ran in a step, 0 once it has ended


def step(
  c: config.Model, how: How, model: Served, slots_Y: Slots, rows: Rows, cache: Cache
) -> tuple[Chosen, Cache]:
  """What follows `rows`, whose tokens are in the cache then."""
  L = rows.tokens_BL.shape[1]
  offset_1L = jnp.arange(L, dtype=jnp.int32)[None]
  positions_BL = rows.start_B[:, None] + offset_1L
  valid_BL = offset_1L < rows.count_B[:, None]
  last_B = jnp.maximum(rows.count_B - 1, 0)
  run = functools.partial(layer.run, c, how.dual_batch, rows.table_BJ)
  # ---- 1. main model -----------------------------------------------------------------------------
  x_BLD = model.embed(c, rows.tokens_BL)
  y, loads = 0, []
  for layers in model.dense:
    x_BLD, cache, _ = run(layers, None, y, x_BLD, positions_BL, valid_BL, cache)
    y += layers.count
  for layers in model.moe:
    first = y - c.num_dense_layers
    slots = jax.tree.map(lambda x, at=first, n=layers.count: x[at : at + n], slots_Y)
    x_BLD, cache, load = run(layers, slots, y, x_BLD, positions_BL, valid_BL, cache)
    loads.append(load)
    y += layers.count
  load_YE = jnp.concatenate(loads)
  load_YE = lax.psum(load_YE, mesh.TOKENS)  # 4 bytes an expert and layer: for the placement
  hidden_BLD = rms_norm(x_BLD, model.final_norm_D, c.norm_eps)
  # ---- 2. choice ---------------------------------------------------------------------------------
  if how.prompt:
    logits_BLV = _logits(c, how, model, _at(hidden_BLD, last_B))
    tokens_BL = _sample(rows.samplings, logits_BLV, _at(positions_BL, last_B) + 1)
    behind_B1 = jnp.where(rows.next_B < 0, tokens_BL[:, 0], rows.next_B)[:, None]
    rolled_BL = jnp.roll(rows.tokens_BL, -1, axis=1)
    behind_BL = jnp.where(offset_1L == last_B[:, None], behind_B1, rolled_BL)
    accepted_B = jnp.zeros_like(rows.count_B)
    sure_BL, newest_B = valid_BL, last_B
  else:
    logits_BLV = _logits(c, how, model, hidden_BLD)
    tokens_BL = behind_BL = _sample(rows.samplings, logits_BLV, positions_BL + 1)
    right_BL = (rows.tokens_BL[:, 1:] == tokens_BL[:, :-1]) & valid_BL[:, 1:]
    accepted_B = jnp.sum(jnp.cumprod(right_BL.astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32)
    sure_BL, newest_B = valid_BL & (offset_1L <= accepted_B[:, None]), accepted_B
  logprob_BL, top_ids, top_logprobs = _logprobs(rows.top, logits_BLV, tokens_BL)
  # ---- 3. drafts ---------------------------------------------------------------------------------
  drafts = []
  if how.drafts:
    x_BLD, at_BL, there_BL, token_BL = hidden_BLD, positions_BL, sure_BL, behind_BL
    for k in range(how.drafts):
      embed_BLD = model.embed(c, token_BL)
      where = embed_BLD, at_BL, there_BL, cache
      x_BLD, cache = _draft(c, how, model.drafter, rows.table_BJ, x_BLD, *where)
      if not k:  # only the newest position goes on
        x_BLD, at_BL, there_BL = (_at(x, newest_B) for x in (x_BLD, at_BL, there_BL))
      token_BL = _sample(rows.samplings, _logits(c, how, model, x_BLD), at_BL + 2)
      drafts.append(token_BL)
      at_BL = at_BL + 1
  drafts_BK = jnp.concatenate(drafts, axis=1) if drafts else tokens_BL[:, :0]
  told = tokens_BL, accepted_B, drafts_BK, logprob_BL, top_ids, top_logprobs, load_YE
  return Chosen(*told), cache


def several(
  c: config.Model,
  how: How,
  model: Served,
  slots_Y: Slots,
  rows: Rows,
  left_B: jax.Array,
  steps: jax.Array,
  cache: Cache,
) -> tuple[Several, Cache]:
  """`steps` of decoding, int32 [], fewer where all rows have ended: by a token of `eos_ids`, or by `left_B`.

  A row's tokens may run over what ends it by the drafts that were right behind it. `left_B`: tokens that
  it may still get, at least 1 where it is there.
  """
  shapes, _ = jax.eval_shape(functools.partial(step, c, how), model, slots_Y, rows, cache)
  like = rows.count_B, rows.tokens_BL
  buffer = lambda x: compat.zeros_like_varying((how.most, *x.shape), x.dtype, *like)
  told = jax.tree.map(buffer, shapes)
  told = dataclasses.replace(
    told,
    drafts_BK=compat.zeros_like_varying(shapes.drafts_BK.shape, jnp.int32, *like),
    load_YE=jnp.zeros(shapes.load_YE.shape, jnp.int32),
  )
  L = rows.tokens_BL.shape[1]
  offset_1L = jnp.arange(L, dtype=jnp.int32)[None]
  anybody = lambda count_B: lax.pmax(jnp.max(count_B), mesh.TOKENS) > 0

  def one(carry):
    s, _, tokens_BL, start_B, count_B, left_B, told, count_SB, cache = carry
    now = dataclasses.replace(rows, tokens_BL=tokens_BL, start_B=start_B, count_B=count_B)
    chosen, cache = step(c, how, model, slots_Y, now, cache)
    put = lambda all_SX, x: lax.dynamic_update_index_in_dim(all_SX, x, s, 0)
    told = Chosen(
      put(told.tokens_BL, chosen.tokens_BL),
      put(told.accepted_B, chosen.accepted_B),
      jnp.where(count_B[:, None] > 0, chosen.drafts_BK, told.drafts_BK),
      put(told.logprob_BL, chosen.logprob_BL),
      put(told.top_ids_BLT, chosen.top_ids_BLT),
      put(told.top_logprobs_BLT, chosen.top_logprobs_BLT),
      told.load_YE + chosen.load_YE,
    )
    count_SB = put(count_SB, count_B)
    # ---- what each row runs next -----------------------------------------------------------------
    new_B = chosen.accepted_B + 1
    sure_BL = offset_1L < new_B[:, None]
    end_BL = functools.reduce(
      jnp.logical_or, [chosen.tokens_BL == eos for eos in how.eos_ids], jnp.zeros_like(sure_BL)
    )
    left_B = left_B - new_B
    goes_on_B = (count_B > 0) & (left_B > 0) & ~jnp.any(sure_BL & end_BL, axis=1)
    count_B = jnp.where(goes_on_B, jnp.minimum(1 + how.drafts, left_B), 0)
    newest_B1 = _at(chosen.tokens_BL, chosen.accepted_B)
    tokens_BL = jnp.concatenate([newest_B1, chosen.drafts_BK], axis=1)
    start_B = start_B + new_B
    state = s + 1, anybody(count_B), tokens_BL, start_B, count_B, left_B
    return *state, told, count_SB, cache

  first = jnp.int32(0), anybody(rows.count_B), rows.tokens_BL, rows.start_B, rows.count_B, left_B
  state = lax.while_loop(
    lambda carry: (carry[0] < steps) & carry[1], one, (*first, told, buffer(rows.count_B), cache)
  )
  return Several(state[6], state[7]), state[8]


def _draft(
  c: config.Model,
  how: How,
  drafter: Drafter,
  table_BJ: jax.Array,
  hidden_BLD: jax.Array,
  embed_BLD: jax.Array,
  positions_BL: jax.Array,
  valid_BL: jax.Array,
  cache: Cache,
) -> tuple[jax.Array, Cache]:
  """Hidden states of the MTP module, which reads the embedded tokens behind its positions."""
  rows = drafter.join(c, hidden_BLD, embed_BLD), positions_BL, valid_BL
  at = how.dual_batch, table_BJ, drafter.layers, None, c.num_layers
  x_BLD, cache, _ = layer.run(c, *at, *rows, cache)
  return rms_norm(x_BLD, drafter.out_norm_D, c.norm_eps), cache


def _logits(c: config.Model, how: How, model: Served, x_BLD: jax.Array) -> jax.Array:
  head_DV = model.head_DV.astype(x_BLD.dtype)
  logits_BLV = jnp.einsum('BLD,DV->BLV', x_BLD, head_DV, preferred_element_type=jnp.float32)
  return logits_BLV[..., : how.vocab_size]


def _sample(s: Samplings, logits_BLV: jax.Array, positions_BL: jax.Array) -> jax.Array:
  B, L, V = logits_BLV.shape
  each = jax.tree.map(lambda x_B: jnp.repeat(x_B, L), s)
  return sample(each, logits_BLV.reshape(B * L, V), positions_BL.reshape(-1)).reshape(B, L)


def _logprobs(
  top: jax.Array, logits_BLV: jax.Array, tokens_BL: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Of the tokens; ids and those of the most probable ones, zeros where nobody asks."""
  B, L, V = logits_BLV.shape
  sum_BL1 = jax.nn.logsumexp(logits_BLV, axis=2, keepdims=True)
  logprob_BL = (jnp.take_along_axis(logits_BLV, tokens_BL[..., None], axis=2) - sum_BL1)[..., 0]
  count = min(TOP, V)

  def find() -> tuple[jax.Array, jax.Array]:
    value_BLT, id_BLT = lax.top_k(logits_BLV, count)
    return id_BLT.astype(jnp.int32), value_BLT - sum_BL1

  nothing_BLT = jnp.broadcast_to(tokens_BL[..., None], (B, L, count))
  nothing = lambda: (nothing_BLT, jnp.zeros_like(nothing_BLT, jnp.float32) + logprob_BL[..., None])
  return logprob_BL, *lax.cond(top, find, nothing)


def _at(x_BLX: jax.Array, index_B: jax.Array) -> jax.Array:
  """[B, 1, ..]: each row's own entry."""
  index = index_B.reshape((-1,) + (1,) * (x_BLX.ndim - 1))
  return jnp.take_along_axis(x_BLX, index, axis=1)
