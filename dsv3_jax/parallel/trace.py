"""A recorded routing trace: which experts each token chose in each layer, in one .npz file.

| array    | what                       | holds                                                         |
|----------|----------------------------|---------------------------------------------------------------|
| `ids`    | uint16 [layers, tokens, K] | experts, best first; tokens in the order of the text          |
| `counts` | int64 [layers, experts]    | tokens that chose each expert                                 |
| `about`  | a string of JSON           | the sizes that `Trace` has, the model, its step and its config |

`python -m dsv3_jax.trace` writes such files; placement, co-design and `bench_dispatch` replay them. NumPy
is all it takes to read one. Weights of the choices are left out: no exchange depends on them.
"""

import dataclasses
import json
import os
import pathlib
import tokenize
import zipfile
import zlib
from typing import Any

import numpy as np

VERSION = 1
_ARRAYS = ('ids', 'counts', 'about')
# What np.load raises, by where the damage lies.
_UNREADABLE = (
  zipfile.BadZipFile, zlib.error, tokenize.TokenError, ValueError, EOFError, NotImplementedError,
  RuntimeError, MemoryError, SyntaxError, TypeError, OverflowError,
)  # fmt: skip


class TraceError(ValueError):
  """A trace that cannot be used; one line that says what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class Trace:
  """Choices of a model on some rows of text; raises TraceError unless a router can have made them."""

  ids_YTK: np.ndarray  # uint16; of each token K different experts, in at most top_groups groups
  num_experts: int
  num_groups: int  # groups of contiguous experts
  top_groups: int
  rows: int
  seq_len: int  # tokens of a row; the last one may have less
  model: str  # where it came from
  step: int | None  # of its checkpoint; None for imported weights
  config: dict[str, Any]  # of the run

  def __post_init__(self) -> None:
    shape, E, G = list(self.ids_YTK.shape), self.num_experts, self.num_groups
    if self.ids_YTK.dtype != np.uint16 or len(shape) != 3 or 0 in shape:
      raise TraceError(
        f'ids are {self.ids_YTK.dtype} {shape}: must be uint16 [layers, tokens, top_k]'
      )
    if min(E, G, self.top_groups) < 1 or E % G or self.top_groups > G:
      sizes = f'num_experts = {E}, num_groups = {G}, top_groups = {self.top_groups}'
      raise TraceError(f'{sizes}: no router has such sizes')
    if not 0 <= self.rows * self.seq_len - self.tokens < self.seq_len:
      raise TraceError(f'{self.tokens} tokens are not {self.rows} rows of {self.seq_len}')
    for layer, ids_TK in enumerate(self.ids_YTK):
      self._check_layer(layer, ids_TK)

  def _check_layer(self, layer: int, ids_TK: np.ndarray) -> None:
    def refuse(wrong_T: np.ndarray, why: str) -> None:
      if wrong_T.any():
        token = int(wrong_T.argmax())
        raise TraceError(f'layer {layer}, token {token} chose {ids_TK[token].tolist()}: {why}')

    sorted_TK = np.sort(ids_TK, axis=1)
    refuse(sorted_TK[:, -1] >= self.num_experts, f'there are {self.num_experts} experts')
    refuse((sorted_TK[:, 1:] == sorted_TK[:, :-1]).any(1), 'they must differ')
    group_TK = sorted_TK // (self.num_experts // self.num_groups)
    groups_T = 1 + np.count_nonzero(np.diff(group_TK, axis=1), axis=1)
    refuse(groups_T > self.top_groups, f'they lie in more than {self.top_groups} groups')

  @property
  def layers(self) -> int:
    return self.ids_YTK.shape[0]

  @property
  def tokens(self) -> int:
    return self.ids_YTK.shape[1]

  @property
  def top_k(self) -> int:
    return self.ids_YTK.shape[2]

  @property
  def counts_YE(self) -> np.ndarray:
    """Tokens that chose each expert, int64."""
    counts = [np.bincount(ids_TK.ravel(), minlength=self.num_experts) for ids_TK in self.ids_YTK]
    return np.stack(counts).astype(np.int64)

  @property
  def load_Y(self) -> np.ndarray:
    """Tokens of each layer's fullest expert over their mean."""
    counts_YE = self.counts_YE
    return counts_YE.max(1) / counts_YE.mean(1)

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes the file, whole or not at all; raises OSError."""
    about = {'version': VERSION, 'top_k': self.top_k}
    about |= {name: getattr(self, name) for name in _FIELDS}
    path = pathlib.Path(path)
    partial = path.with_name(f'.{path.name}.partial')
    with open(partial, 'wb') as file:
      np.savez_compressed(
        file, ids=self.ids_YTK, counts=self.counts_YE, about=np.array(json.dumps(about))
      )
    partial.replace(path)


_FIELDS = {f.name: f.type for f in dataclasses.fields(Trace) if f.name != 'ids_YTK'}


def load(path: str | os.PathLike[str]) -> Trace:
  """Reads a trace; raises TraceError, one line that begins with the path, for anything that is none."""
  try:
    return _load(path)
  except TraceError as error:
    raise TraceError(f'{path}: {error}') from None
  except OSError as error:
    raise TraceError(f'{path}: cannot be read: {error.strerror or error}') from None


def _load(path: str | os.PathLike[str]) -> Trace:
  try:
    with open(path, 'rb') as opened:  # np.load leaves damaged files open
      file = np.load(opened, allow_pickle=False)
      if not isinstance(file, np.lib.npyio.NpzFile):
        raise TraceError('is a single array; a trace is an .npz with ids, counts and about')
      missing = [name for name in _ARRAYS if name not in file.files]
      if missing:
        raise TraceError(f'has no {" and no ".join(missing)}; wants a file of dsv3_jax.trace')
      ids_YTK, counts_YE, about = (file[name] for name in _ARRAYS)
  except TraceError:
    raise
  except _UNREADABLE as error:
    reason = str(error).partition('\n')[0] or type(error).__name__
    raise TraceError(f'is no .npz file, or a damaged one: {reason}') from None
  values = _header(about)
  trace = Trace(ids_YTK, **{name: values[name] for name in _FIELDS})
  if values['top_k'] != trace.top_k:
    raise TraceError(f'about says top_k = {values["top_k"]}: ids have {trace.top_k} a token')
  if counts_YE.dtype != np.int64 or not np.array_equal(counts_YE, trace.counts_YE):
    raise TraceError('counts are not those of ids')
  return trace


def _header(about: np.ndarray) -> dict[str, Any]:
  """The values of `about`, of the right version and types."""
  if about.dtype.kind != 'U' or about.ndim:
    raise TraceError(f'about is {about.dtype} {list(about.shape)}: must be a single string')
  try:
    values = json.loads(str(about))
  except json.JSONDecodeError as error:
    raise TraceError(f'about is not JSON: {error}') from None
  if not isinstance(values, dict) or values.get('version') != VERSION:
    found = values.get('version') if isinstance(values, dict) else None
    raise TraceError(f'is of version {found}: this program reads version {VERSION}')
  for name, kind in {'top_k': int, **_FIELDS}.items():
    if name not in values:
      raise TraceError(f'about has no {name}')
    kind = dict if name == 'config' else kind
    if not isinstance(values[name], kind) or isinstance(values[name], bool):
      raise TraceError(f'about says {name} = {values[name]!r}: of another type')
  return values
