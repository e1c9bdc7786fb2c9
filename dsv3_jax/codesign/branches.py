"""Recorded activations: what every FFN of a trained model adds to the residual stream, in one .npz file.

| array    | what                         | holds                                         |
|----------|------------------------------|-----------------------------------------------|
| `values` | float32 [layers, tokens, D]  | tokens in the order of the text               |
| `about`  | a string of JSON             | version, the model and its step               |

This is what a combine carries, and where arXiv 2505.09343, 3.2, tried LogFMT. `python -m
dsv3_jax.activations` writes such files; NumPy is all it takes to read one.
"""

import dataclasses
import json
import os
import pathlib
import zipfile
import zlib

import numpy as np

VERSION = 1
# What np.load raises for a file that is none, or damaged.
_UNREADABLE = (zipfile.BadZipFile, zlib.error, ValueError, EOFError, KeyError, NotImplementedError)


@dataclasses.dataclass(frozen=True)
class Branches:
  """Raises ValueError unless values are finite float32 [layers, tokens, D]."""

  values_YTD: np.ndarray
  model: str  # where it came from
  step: int | None  # of its checkpoint; None for imported weights

  def __post_init__(self) -> None:
    x = self.values_YTD
    if x.dtype != np.float32 or x.ndim != 3 or 0 in x.shape:
      raise ValueError(f'values are {x.dtype} {list(x.shape)}: must be float32 [layers, tokens, D]')
    if not np.isfinite(x).all():
      raise ValueError(f'values: {np.count_nonzero(~np.isfinite(x))} of them are not finite')

  @property
  def name(self) -> str:
    return f'{self.model}, ' + ('imported' if self.step is None else f'step {self.step}')

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes the file, whole or not at all; raises OSError."""
    about = {'version': VERSION, 'model': self.model, 'step': self.step}
    path = pathlib.Path(path)
    partial = path.with_name(f'.{path.name}.partial')
    with open(partial, 'wb') as file:
      np.savez_compressed(file, values=self.values_YTD, about=np.array(json.dumps(about)))
    partial.replace(path)


def load(path: str | os.PathLike[str]) -> Branches:
  """Reads a file; raises ValueError, one line that begins with the path, for anything that is none."""
  try:
    with open(path, 'rb') as opened:  # np.load leaves damaged files open
      file = np.load(opened, allow_pickle=False)
      values, about = file['values'], json.loads(str(file['about']))
    if about['version'] != VERSION:
      raise ValueError(f'is of version {about["version"]}: this program reads version {VERSION}')
    return Branches(values, about['model'], about['step'])
  except OSError as error:
    raise ValueError(f'{path}: cannot be read: {error.strerror or error}') from None
  except (*_UNREADABLE, IndexError, TypeError) as error:
    reason = str(error).partition('\n')[0] or type(error).__name__
    raise ValueError(f'{path}: is no file of dsv3_jax.activations: {reason}') from None
