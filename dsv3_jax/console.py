"""What programs share: a parser, exit codes with one line for whatever cannot work, a bar of progress."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn, TextIO

import rich.console
import rich.progress

from dsv3_jax.config import ConfigError


class Parser(argparse.ArgumentParser):
  """Raises ConfigError, one line, where argparse would print its usage and exit."""

  def error(self, message: str) -> NoReturn:
    raise ConfigError(f'{message}; --help shows what there is')


def run(
  name: str,
  parse: Callable[[Sequence[str] | None], argparse.Namespace],
  work: Callable[[argparse.Namespace], int | None],
  arguments: Sequence[str] | None,
  *,
  file: str,
  told: tuple[type[Exception], ...] = (),
  interrupted: str = '',
) -> int:
  """What `work` returns, 0 for None; 2 after one line for ConfigError, OSError and `told`; 130 for Ctrl-C.

  `file`: the argument that names the file of an OSError that names none, as a full disk does.
  """
  args = argparse.Namespace()
  try:
    args = parse(arguments)
    return work(args) or 0
  except (ConfigError, *told) as error:
    print(f'{name}: {error}', file=sys.stderr)
    return 2
  except BrokenPipeError:  # the reader has seen enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
  except OSError as error:
    at = error.filename or getattr(args, file, '')
    print(f'{name}: {at}: {error.strerror}', file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print(f'\n{name}: {interrupted}' if interrupted else '', file=sys.stderr)
    return 130


def bar(stream: TextIO, *counted: rich.progress.ProgressColumn) -> rich.progress.Progress | None:
  """A bar behind the columns `counted`, with a task's field `figures` at its end; None off a terminal."""
  console = rich.console.Console(file=stream, force_terminal=stream.isatty())
  if not console.is_terminal or console.is_dumb_terminal:
    return None
  return rich.progress.Progress(
    *counted,
    rich.progress.BarColumn(bar_width=None),
    rich.progress.TextColumn('{task.fields[figures]}'),
    console=console,
    refresh_per_second=4,
    expand=True,
  )
