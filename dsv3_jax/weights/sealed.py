"""Small JSON files that say whether they are what was written: whole or not there, and checksummed."""

import json
import os
import pathlib
import zlib
from typing import Any

from dsv3_jax.config import ConfigError


def write(path: pathlib.Path, body: dict[str, Any]) -> None:
  """Writes `body` with its CRC-32, through to the disk; a kill leaves at most `partial(path)`."""
  with partial(path).open('w', encoding='utf-8') as file:
    file.write(json.dumps({'body': body, 'crc32': _crc32(body)}, indent=1) + '\n')
    file.flush()
    os.fsync(file.fileno())
  os.replace(partial(path), path)


def read(path: pathlib.Path) -> dict[str, Any] | None:
  """What `write` was given; None where there is no file. Raises ConfigError if it is damaged."""
  try:
    found = json.loads(path.read_text(encoding='utf-8'))
    whole = isinstance(found['body'], dict) and found['crc32'] == _crc32(found['body'])
  except FileNotFoundError:
    return None
  except OSError as error:
    raise ConfigError(f'{path}: cannot be read: {error.strerror}') from None
  except (ValueError, LookupError, TypeError):
    whole = False
  if not whole:
    raise ConfigError(f'{path}: is damaged; remove the folder and import again')
  return found['body']


def partial(path: pathlib.Path) -> pathlib.Path:
  """The name that a file has until it is whole."""
  return path.with_name(f'.{path.name}.partial')


def _crc32(body: dict[str, Any]) -> int:
  return zlib.crc32(json.dumps(body, sort_keys=True).encode())
