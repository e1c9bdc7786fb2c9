"""Who owns which page of one device's latent cache, on the host; and prompts that share their beginning.

A page that a prompt has filled gets a name: the hash of its tokens and of the name of the page before, so
that two pages of one name hold the same entries. A later prompt that begins alike takes those pages
instead of computing them. Pages are only read once they are full, so sharing needs no copy. One that
nobody owns keeps its name and its entries until its place is needed, the one longest out of use first.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from dsv3_jax.kernels.mla_decode import PAGE


def names(tokens: Sequence[int], *, ahead: int) -> list[bytes]:
  """One name for each page that `tokens` fill.

  `ahead`: tokens behind a page that its entries depend on; 1 with an MTP module, which reads the token
  after each position.
  """
  chain, found = b'', []
  for start in range(0, len(tokens) - PAGE - ahead + 1, PAGE):
    content = np.asarray(tokens[start : start + PAGE + ahead], np.int32).tobytes()
    chain = hashlib.blake2b(chain + content, digest_size=16).digest()
    found.append(chain)
  return found


class Pool:
  def __init__(self, pages: int) -> None:
    self.size = pages
    self._free = list(range(pages - 1, -1, -1))
    self._owners = [0] * pages
    self._name: list[bytes | None] = [None] * pages
    self._page: dict[bytes, int] = {}
    self._idle: OrderedDict[int, None] = OrderedDict()  # named, owned by nobody, oldest first

  @property
  def available(self) -> int:
    """Pages that `take` can give."""
    return len(self._free) + len(self._idle)

  @property
  def owned(self) -> int:
    return self.size - self.available

  def find(self, wanted: Sequence[bytes]) -> list[int]:
    """Pages of the longest run of names from the first on that are here; owned by nobody new."""
    found = []
    for name in wanted:
      if name not in self._page:
        break
      found.append(self._page[name])
    return found

  def take(self, count: int, shared: Sequence[int] = ()) -> list[int] | None:
    """`shared`, owned once more, and fresh pages behind them, `count` in all; None if there are too few."""
    idle = sum(page in self._idle for page in shared)
    if count - len(shared) > self.available - idle:
      return None
    for page in shared:
      self._idle.pop(page, None)
    pages = [*shared, *(self._fresh() for _ in range(count - len(shared)))]
    for page in pages:
      self._owners[page] += 1
    return pages

  def give_name(self, page: int, name: bytes) -> None:
    """Says what a page holds, from now on unchanged. A name that another page has stays with that one."""
    if self._name[page] is None and name not in self._page:
      self._name[page], self._page[name] = name, page

  def give_back(self, pages: Sequence[int]) -> None:
    """Ends one ownership of each; the last pages of a run are reused first."""
    for page in reversed(pages):
      self._owners[page] -= 1
      if not self._owners[page]:
        if self._name[page] is None:
          self._free.append(page)
        else:
          self._idle[page] = None

  def _fresh(self) -> int:
    if self._free:
      return self._free.pop()
    page, _ = self._idle.popitem(last=False)
    name, self._name[page] = self._name[page], None
    del self._page[name]
    return page
