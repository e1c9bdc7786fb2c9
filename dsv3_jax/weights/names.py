"""The one table between the tensors of a Hugging Face checkpoint and the leaves of our params tree.

A `Slot` says where one chunk of ours (a leaf, or one layer, or one expert of one layer of it) lies in a
released checkpoint. Every number of our tree is in exactly one slot; a released tensor is in one slot,
or in several that share it without overlap:

| released tensor, prefix `model.layers.N.` | shape                  | ours, without its stack        |
|-------------------------------------------|------------------------|--------------------------------|
| self_attn.q_a_proj.weight                 | [Q, D]                 | attn.q_down_DQ                 |
| self_attn.q_b_proj, q_proj                | [N (H + R), Q or D]    | attn.q_up_QNJ, attn.q_DNJ      |
| self_attn.kv_a_proj_with_mqa              | [C + R, D]             | attn.kv_down_DC, k_rope_DR     |
| self_attn.kv_b_proj                       | [N (H + V), C]         | attn.k_up_CNH, v_up_CNV        |
| self_attn.o_proj                          | [D, N V]               | attn.out_NVD                   |
| mlp.{gate,up,down}_proj                   | [F, D], [F, D], [D, F] | ffn.{gate_DF,up_DF,down_FD}    |
| mlp.shared_experts.*_proj                 | the same               | ffn.shared.*                   |
| mlp.gate.weight                           | [E, D]                 | ffn.router_DE                  |
| mlp.gate.e_score_correction_bias          | [E], always float32    | router_bias: ffn.bias_E        |
| mlp.experts.E.*_proj                      | as of a dense layer    | ffn.{gate,up}_EDF, down_EFD    |
| mlp.experts.gate_up_proj, stacked         | [E, 2F, D]             | ffn.gate_EDF, up_EDF           |
| mlp.experts.down_proj, stacked            | [E, D, F]              | ffn.down_EFD                   |
| eh_proj.weight                            | [D, 2D]                | mtp.proj_XD                    |

Layers 0.. of a checkpoint are ours in `dense_layers`, then `moe_layers`; MTP modules follow as further
layers. Both projections of an MTP module act on [embedding ; hidden], in released weights and here: the
table only transposes. Rotary dimensions are adjacent pairs in released weights and here; a checkpoint
that keeps them as two halves (`rope_interleave: false`) is permuted here, and nowhere else.

Names: `README_WEIGHTS.md` and `inference/convert.py` of deepseek-ai/DeepSeek-V3; the stacked form is
what transformers 5 holds in memory.
"""

import dataclasses
import math
from collections.abc import Collection, Iterator

import numpy as np

from dsv3_jax import config

BLOCK = 128  # rows and columns of an FP8 block with one scale
SCALE = '_scale_inv'  # appended to the name of an FP8 tensor
Path = tuple[str, ...]
Index = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Slot:
  """Where one chunk of our tree lies in a released checkpoint.

  From theirs to ours: take `tensor[part]`, reshape it to `view`, take `cut` of that, order its axes as
  `order` says. `part` are leading entries (the expert of a stacked tensor), so it is one stretch of the
  file.
  """

  name: str
  shape: tuple[int, ...]  # of the whole tensor
  path: (
    Path  # ('params', 'moe_layers', 'attn', 'q_down_DQ'); the first is 'params' or 'router_bias'
  )
  index: Index  # leading entries of our leaf: layer, expert; () is the whole leaf
  view: tuple[int, ...]
  cut: tuple[slice, ...]
  order: tuple[int, ...]
  part: Index = ()
  halves: tuple[int, int] | None = None  # (axis of view, R): its last R entries are two halves
  quantised: bool = False  # stored as FP8 with scales in an FP8 checkpoint
  f32: bool = False  # float32 in every checkpoint
  copy_of: str | None = None  # a second stored copy of that tensor: not read, but compared

  @property
  def ours_shape(self) -> tuple[int, ...]:
    """Shape of the chunk of ours."""
    sizes = [len(range(*s.indices(n))) for s, n in zip(self.cut, self.view, strict=True)]
    return tuple(sizes[axis] for axis in self.order)

  @property
  def part_shape(self) -> tuple[int, ...]:
    """Shape of `tensor[part]`: what `to_ours` takes."""
    return self.shape[len(self.part) :]

  @property
  def whole(self) -> bool:
    """The chunk is all of its tensor's part."""
    return math.prod(self.ours_shape) == math.prod(self.part_shape)

  def to_ours(self, x: np.ndarray) -> np.ndarray:
    """`tensor[part]` of any dtype -> our chunk; a view where the layout allows."""
    _expect(self.name, x.shape, self.part_shape)
    return self._pairs(x.reshape(self.view)[self.cut]).transpose(self.order)

  def put(self, x: np.ndarray, into: np.ndarray) -> None:
    """Writes our chunk to its place in `into`, a contiguous array like `tensor[part]`."""
    _expect('/'.join(self.path), x.shape, self.ours_shape)
    _expect(self.name, into.shape, self.part_shape)
    if not into.flags.c_contiguous:
      raise ValueError(f'{self.name}: the array to fill is not contiguous')
    back = self._pairs(x.transpose(np.argsort(self.order)), undo=True)
    into.reshape(self.view)[self.cut] = back

  def to_hf(self, x: np.ndarray) -> np.ndarray:
    """Inverse of `to_ours` where the slot is `whole`; the rest is zero otherwise."""
    into = np.zeros(self.part_shape, x.dtype)
    self.put(x, into)
    return into

  def _pairs(self, x: np.ndarray, undo: bool = False) -> np.ndarray:
    """Rotary dimensions from halves (0, 2, .., 1, 3, ..) to adjacent pairs, or back."""
    if self.halves is None:
      return x
    axis, size = self.halves
    fixed, total = x.shape[axis] - size, x.shape[axis]
    pairs = np.arange(size).reshape(2, -1).T.reshape(-1)
    source = np.arange(total)
    source[fixed:] = fixed + (np.argsort(pairs) if undo else pairs)
    return x.take(source, axis=axis)


def table(
  c: config.Model,
  *,
  family: str,
  stacked_experts: bool = False,
  mtp: bool = True,
  interleaved: bool = True,
) -> list[Slot]:
  """Every slot of a checkpoint of this model, in the order of its layers.

  Args:
    family: 'deepseek_v3', with router biases, or 'deepseek_v2', without.
    stacked_experts: one tensor per layer for all experts' gate and up, one for down.
    mtp: with the MTP layers and their copies of embedding and head.
    interleaved: rotary dimensions are stored as adjacent pairs, not as two halves.
  """
  V, D = c.vocab_size, c.dim
  slots = [_plain('model.embed_tokens.weight', ('params', 'embed_VD'), (), (V, D), flip=False)]
  for layer in range(c.num_layers):
    dense = layer < c.num_dense_layers
    stack = 'dense_layers' if dense else 'moe_layers'
    index = (layer if dense else layer - c.num_dense_layers,)
    prefix = f'model.layers.{layer}.'
    slots += _block(c, prefix, (stack,), index, dense, family, stacked_experts, interleaved)
  slots.append(_plain('model.norm.weight', ('params', 'final_norm_D'), (), (D,)))
  slots.append(_plain('lm_head.weight', ('params', 'head_DV'), (), (V, D)))
  for depth in range(c.mtp_depth if mtp else 0):
    prefix, index = f'model.layers.{c.num_layers + depth}.', (depth,)
    slots += _block(c, prefix, ('mtp', 'block'), index, False, family, stacked_experts, interleaved)
    slots += _mtp(c, prefix, index)
  return slots


def chunk_slots(slots: list[Slot]) -> dict[tuple[Path, Index], Slot]:
  """{(path, index) of our chunk: the slot to read it from}; copies left out."""
  return {(s.path, s.index): s for s in slots if s.copy_of is None}


def tensor_slots(slots: list[Slot]) -> dict[str, list[Slot]]:
  """{name of a released tensor: the slots it is made of}, copies included, scales not."""
  tensors: dict[str, list[Slot]] = {}
  for slot in slots:
    tensors.setdefault(slot.name, []).append(slot)
  return tensors


def chunks(c: config.Model) -> Iterator[tuple[Path, Index, tuple[int, ...]]]:
  """(path, index, shape) of every chunk of our tree, biases of a softmax router included.

  Those biases have no slot in a checkpoint of V2: they are zero there.
  """
  for slot in table(c, family='deepseek_v3'):
    if slot.copy_of is None:
      yield slot.path, slot.index, slot.ours_shape


def scale_name(slot: Slot) -> str:
  """Name of the scales of a tensor that is stored as FP8."""
  return slot.name + SCALE


def scale_shape(slot: Slot) -> tuple[int, ...]:
  """One scale per block of 128 x 128 of the last two dimensions, the last ones ragged."""
  *lead, rows, columns = slot.shape
  return (*lead, -(-rows // BLOCK), -(-columns // BLOCK))


def stored_stacked(names: Collection[str]) -> bool:
  """Whether a checkpoint with these tensors keeps experts stacked."""
  return any(name.endswith('.mlp.experts.down_proj') for name in names)


def stored_mtp_depth(names: Collection[str], num_layers: int) -> int:
  """MTP modules that a checkpoint with these tensors holds, from `model.layers.N` of its names."""
  layers = set()
  for name in names:
    number = name.removeprefix('model.layers.').partition('.')[0]
    if name.startswith('model.layers.') and number.isascii() and number.isdigit():
      layers.add(int(number) if len(number) < 10 else 0)
  depth = 0
  while num_layers + depth in layers:
    depth += 1
  return depth


# ---- parts of a model ----------------------------------------------------------------------------


def _plain(
  name: str, path: Path, index: Index, shape: tuple[int, ...], *, flip: bool = True, **more: object
) -> Slot:
  """A whole tensor: a vector, or a matrix that lies transposed in ours."""
  order = tuple(range(len(shape)))[:: -1 if flip else 1]
  return Slot(name, shape, path, index, shape, (slice(None),) * len(shape), order, **more)


def _block(
  c: config.Model,
  prefix: str,
  stack: Path,
  index: Index,
  dense: bool,
  family: str,
  stacked: bool,
  interleaved: bool,
) -> list[Slot]:
  D, F = c.dim, c.moe.expert_dim
  path, attn, ffn = ('params', *stack), prefix + 'self_attn.', prefix + 'mlp.'
  slots = [_plain(prefix + 'input_layernorm.weight', (*path, 'attn_norm_D'), index, (D,))]
  slots += _attention(c, attn, (*path, 'attn'), index, interleaved)
  slots.append(
    _plain(prefix + 'post_attention_layernorm.weight', (*path, 'ffn_norm_D'), index, (D,))
  )
  path = (*path, 'ffn')
  if dense:
    return slots + _ffn(ffn, path, index, D, c.ffn_dim)
  E = c.moe.num_experts
  slots.append(_plain(ffn + 'gate.weight', (*path, 'router_DE'), index, (E, D)))
  if family == 'deepseek_v3':
    bias = ffn + 'gate.e_score_correction_bias'
    slots.append(_plain(bias, ('router_bias', *stack, 'ffn', 'bias_E'), index, (E,), f32=True))
  for e in range(E):
    at = (*index, e)
    if stacked:
      slots += _stacked_expert(ffn + 'experts.', path, at, c)
    else:
      slots += _ffn(f'{ffn}experts.{e}.', path, at, D, F, ours=('gate_EDF', 'up_EDF', 'down_EFD'))
  if c.moe.num_shared:
    shared = ffn + 'shared_experts.'
    slots += _ffn(shared, (*path, 'shared'), index, D, c.moe.num_shared * F)
  return slots


def _attention(
  c: config.Model, prefix: str, path: Path, index: Index, interleaved: bool
) -> list[Slot]:
  D, m = c.dim, c.mla
  N, Q, C, H, R, V = m.num_heads, m.q_rank, m.kv_rank, m.nope_dim, m.rope_dim, m.v_dim
  every = slice(None)

  def matrix(name, leaf, shape, view, order, cut=None, rope_axis=None) -> Slot:
    cut = cut or (every,) * len(view)
    halves = None if interleaved or rope_axis is None else (rope_axis, R)
    name, at = f'{prefix}{name}.weight', (*path, leaf)
    return Slot(name, shape, at, index, view, cut, order, halves=halves, quantised=True)

  slots, rows, wide = [], N * (H + R), Q or D
  if Q:
    slots.append(matrix('q_a_proj', 'q_down_DQ', (Q, D), (Q, D), (1, 0)))
    slots.append(_plain(prefix + 'q_a_layernorm.weight', (*path, 'q_norm_Q'), index, (Q,)))
  name, leaf = ('q_b_proj', 'q_up_QNJ') if Q else ('q_proj', 'q_DNJ')
  slots.append(matrix(name, leaf, (rows, wide), (N, H + R, wide), (2, 0, 1), rope_axis=1))
  shape = (C + R, D)
  for leaf, cut, axis in (
    ('kv_down_DC', slice(0, C), None),
    ('k_rope_DR', slice(C, C + R), 0),
  ):
    kv = 'kv_a_proj_with_mqa'
    slots.append(matrix(kv, leaf, shape, shape, (1, 0), (cut, every), rope_axis=axis))
  slots.append(_plain(prefix + 'kv_a_layernorm.weight', (*path, 'kv_norm_C'), index, (C,)))
  shape, view = (N * (H + V), C), (N, H + V, C)
  for leaf, cut in (('k_up_CNH', slice(0, H)), ('v_up_CNV', slice(H, H + V))):
    slots.append(matrix('kv_b_proj', leaf, shape, view, (2, 0, 1), (every, cut, every)))
  slots.append(matrix('o_proj', 'out_NVD', (D, N * V), (D, N, V), (1, 2, 0)))
  return slots


def _ffn(
  prefix: str,
  path: Path,
  index: Index,
  D: int,
  F: int,
  ours: tuple[str, str, str] = ('gate_DF', 'up_DF', 'down_FD'),
) -> list[Slot]:
  theirs = (('gate_proj', (F, D)), ('up_proj', (F, D)), ('down_proj', (D, F)))
  return [
    _plain(f'{prefix}{name}.weight', (*path, leaf), index, shape, quantised=True)
    for (name, shape), leaf in zip(theirs, ours, strict=True)
  ]


def _stacked_expert(prefix: str, path: Path, index: Index, c: config.Model) -> list[Slot]:
  """One expert of [E, 2F, D] and [E, D, F]; these names have no `.weight`."""
  E, D, F = c.moe.num_experts, c.dim, c.moe.expert_dim
  part, every = index[-1:], slice(None)
  slots = []
  for leaf, cut in (('gate_EDF', slice(0, F)), ('up_EDF', slice(F, 2 * F))):
    at, cuts = (*path, leaf), (cut, every)
    shape, view = (E, 2 * F, D), (2 * F, D)
    name = prefix + 'gate_up_proj'
    slots.append(Slot(name, shape, at, index, view, cuts, (1, 0), part, quantised=True))
  name, at = prefix + 'down_proj', (*path, 'down_EFD')
  slots.append(
    Slot(name, (E, D, F), at, index, (D, F), (every, every), (1, 0), part, quantised=True)
  )
  return slots


def _mtp(c: config.Model, prefix: str, index: Index) -> list[Slot]:
  """What an MTP layer has beyond a MoE layer."""
  V, D, path = c.vocab_size, c.dim, ('params', 'mtp')
  main, head = 'model.embed_tokens.weight', 'lm_head.weight'
  copy = prefix + 'embed_tokens.weight', prefix + 'shared_head.head.weight'
  return [
    _plain(prefix + 'enorm.weight', (*path, 'embed_norm_D'), index, (D,)),
    _plain(prefix + 'hnorm.weight', (*path, 'hidden_norm_D'), index, (D,)),
    _plain(prefix + 'eh_proj.weight', (*path, 'proj_XD'), index, (D, 2 * D)),
    _plain(prefix + 'shared_head.norm.weight', (*path, 'out_norm_D'), index, (D,)),
    _plain(copy[0], ('params', 'embed_VD'), (), (V, D), flip=False, copy_of=main),
    _plain(copy[1], ('params', 'head_DV'), (), (V, D), copy_of=head),
  ]


def _expect(name: str, shape: tuple[int, ...], right: tuple[int, ...]) -> None:
  if tuple(shape) != right:
    raise config.ConfigError(f'{name}: shape {list(shape)}; must be {list(right)}')
