"""Which blocks of a model stand in which stage, for any number of blocks over any even pipe.

Stages are unequal, and one program serves all ranks: every stage has as many places as the longest, in some
of which a dense layer may stand, in some an MoE layer, in some either. Tables say what does; a place without
a block computes one and lets its input pass.
"""

import dataclasses

import numpy as np

NOTHING = -1


@dataclasses.dataclass(frozen=True)
class Held:
  """What ranks hold of a stack of `count` blocks; an unused place holds the first one, so none is empty."""

  index: np.ndarray  # int32 [ranks, held]
  used: np.ndarray  # bool
  count: int


@dataclasses.dataclass(frozen=True)
class Stages:
  """Blocks are numbered dense layers first, then MoE layers, then those of the MTP modules."""

  dense: int
  moe: int
  mtp: int
  blocks: np.ndarray  # int32 [stages, places]: number of the block, or NOTHING

  @property
  def stages(self) -> int:
    return self.blocks.shape[0]

  @property
  def places(self) -> int:
    return self.blocks.shape[1]

  def may_be_dense(self, place: int) -> bool:
    column = self.blocks[:, place]
    return bool(((column >= 0) & (column < self.dense)).any())

  def may_be_moe(self, place: int) -> bool:
    return bool((self.blocks[:, place] >= self.dense).any())

  @property
  def end(self) -> int:
    """Place of the last stage before which the main model ends: its head, then the MTP modules."""
    return int((self.blocks[-1] >= 0).sum()) - self.mtp

  def held(self, first: int, count: int, places: list[int] | None = None) -> Held:
    """Which of the blocks first.. every rank has in `places` (all): route 0's stage, then route 1's."""
    blocks = self.blocks if places is None else self.blocks[:, places]
    used = (blocks >= first) & (blocks < first + count)
    index = np.where(used, blocks - first, 0).astype(np.int32)
    both = lambda x: np.concatenate([x, x[::-1]], axis=1)
    return Held(both(index), both(used), count)


def arrange(dense: int, moe: int, mtp: int, stages: int) -> Stages:
  """Even shares; the ends, which have embedding and heads besides, are last to get one block more.

  ValueError, one line, where there are too few blocks, or the last stage has no room for the MTP modules.
  """
  blocks = dense + moe + mtp
  if blocks < stages:
    raise ValueError(
      f'{stages} stages for {blocks} blocks (layers and MTP modules): must be at most {blocks - blocks % 2}'
    )
  share, more = divmod(blocks, stages)
  sizes = np.full(stages, share)
  order = [*range(1, stages - 1), 0, stages - 1]
  sizes[order[:more]] += 1
  if sizes[-1] < mtp:
    right = max((s for s in range(2, stages, 2) if blocks // s >= mtp), default=1)
    raise ValueError(
      f'{stages} stages with {mtp} MTP modules, which stand in the last one, where {sizes[-1]} block fits: '
      f'must be at most {right}'
    )
  table = np.full((stages, sizes.max()), NOTHING, np.int32)
  ends = np.cumsum(sizes)
  for s, (size, end) in enumerate(zip(sizes, ends, strict=True)):
    table[s, :size] = np.arange(end - size, end)
  return Stages(dense, moe, mtp, table)
