"""Bytes in and out of files, without mapping them, and with errors as one line that names the file."""

import contextlib
import json
import os
import pathlib
import stat
from collections.abc import Iterator
from typing import Any

import numpy as np

from dsv3_jax.weights.headers import FormatError


@contextlib.contextmanager
def opened(path: pathlib.Path) -> Iterator[int]:
  """Descriptor of a regular file to read; FormatError if it cannot be opened or is something else."""
  try:
    # Without O_NONBLOCK, a pipe under the name of a file would wait for its writer for ever.
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
  except OSError as error:
    raise FormatError(f'{path}: cannot be opened: {error.strerror}') from None
  try:
    if not stat.S_ISREG(os.fstat(file).st_mode):
      raise FormatError(f'{path}: is no regular file')
    yield file
  finally:
    os.close(file)


def read_into(file: int, out: np.ndarray, offset: int, path: pathlib.Path) -> None:
  """Fills `out`, contiguous, with the bytes at `offset`; FormatError if there are too few."""
  rest = memoryview(out.reshape(-1).view(np.uint8))
  while rest:
    try:
      got = os.preadv(file, [rest], offset)  # Linux reads at most 2 GB at once
    except OSError as error:
      raise FormatError(f'{path}: cannot be read: {error.strerror}') from None
    if not got:
      raise FormatError(f'{path}: ends at byte {offset}, {len(rest)} too early; it is truncated')
    rest, offset = rest[got:], offset + got


def read_bytes(file: int, count: int, offset: int, path: pathlib.Path) -> bytes:
  out = np.empty(count, np.uint8)
  read_into(file, out, offset, path)
  return out.tobytes()


@contextlib.contextmanager
def created(path: pathlib.Path) -> Iterator[int]:
  """Descriptor of a new file, or of an old one made empty; at the end its bytes are on the disk."""
  with _written(path):
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
  try:
    yield file
    with _written(path):
      os.fsync(file)
  finally:
    os.close(file)


def write(file: int, data: bytes | np.ndarray, path: pathlib.Path) -> None:
  """All bytes of `data` at the end of `file`, however many the system takes at once.

  The disk is told to begin with them now, so that fsync at the end waits for the last of them alone.
  """
  if isinstance(data, np.ndarray):
    data = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
  rest = whole = memoryview(data)
  with _written(path):
    while rest:
      rest = rest[os.write(file, rest) :]
    if hasattr(os, 'posix_fadvise'):  # not on macOS
      start = os.lseek(file, 0, os.SEEK_CUR) - len(whole)
      os.posix_fadvise(file, start, len(whole), os.POSIX_FADV_DONTNEED)


def write_json(path: pathlib.Path, content: Any) -> None:
  """Writes the file under another name first, so that under its own it is whole."""
  partial = path.with_name(f'{path.name}.partial')
  with created(partial) as file:
    text = json.dumps(content, indent=2, ensure_ascii=False) + '\n'
    write(file, text.encode(), path)
  rename(partial, path)


def rename(partial: pathlib.Path, path: pathlib.Path) -> None:
  """Gives a file, whose bytes are on the disk, its name there too."""
  with _written(path):
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
      os.fsync(folder)
    finally:
      os.close(folder)


@contextlib.contextmanager
def _written(path: pathlib.Path) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise FormatError(f'{path}: cannot be written: {error.strerror}') from None
