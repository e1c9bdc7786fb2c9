"""A Jinja template in a process of its own: what it may take of time, memory and length has an end.

A template comes with weights from elsewhere. It runs in Jinja's immutable sandbox, where attributes that
lead out of it raise; but the sandbox ends no loop and no multiplication. So it runs in a child, which knows
nothing of the server, speaks lines of JSON, is ended by the kernel after `SECONDS`, and may map `MEMORY`
bytes. The child imports Jinja and the standard library alone. One that was ended is started again.
"""

import contextlib
import json
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 5.0
MEMORY = 512 << 20
LONGEST = 4 << 20  # characters of a result


class TemplateError(Exception):
  """A template that is none, refuses what it was given, or took too much."""


class Template:
  """Raises TemplateError for what is no Jinja. Any thread may render; one at a time does."""

  def __init__(self, text: str) -> None:
    self._text = text
    self._lock = threading.Lock()
    self._child: subprocess.Popen | None = None
    self._start()

  def render(self, values: Mapping[str, Any]) -> str:
    """Raises TemplateError."""
    with self._lock:
      if self._child is None:
        self._start()
      return self._ask(values)

  def close(self) -> None:
    """Ends the child; rendering starts another."""
    with self._lock:
      self._end()

  def _start(self) -> None:
    # Not as a module: -I keeps the child to what is installed, and its folder off the path.
    arguments = [sys.executable, '-I', __file__, str(SECONDS)]
    pipe = subprocess.PIPE
    self._child = subprocess.Popen(arguments, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
    try:
      self._ask(self._text)
    except TemplateError:
      self._end()
      raise

  def _ask(self, what: Any) -> str:
    try:
      self._child.stdin.write(json.dumps(what).encode() + b'\n')
      self._child.stdin.flush()
      line = self._child.stdout.readline()
    except BrokenPipeError:
      line = b''
    if not line:
      raise TemplateError(self._end())
    answer = json.loads(line)
    if 'error' in answer:
      raise TemplateError(answer['error'])
    return answer['text']

  def _end(self) -> str:
    """Why the child is no more, where it ended by itself."""
    child, self._child = self._child, None
    if child is None:
      return ''
    child.stdout.close()
    with contextlib.suppress(BrokenPipeError):
      child.stdin.close()
    try:
      code = child.wait(timeout=SECONDS + 1)
    except subprocess.TimeoutExpired:
      child.kill()
      code = child.wait()
    if code == -signal.SIGALRM:
      return f'it took more than {SECONDS:g} seconds'
    return f'its process ended with {code}'


# ---- in the child --------------------------------------------------------------------------------


def _main() -> None:
  """Answers a line for each line: the template first, then what it is to be given."""
  seconds = float(sys.argv[1])
  resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  template = None
  for line in sys.stdin.buffer:
    signal.setitimer(signal.ITIMER_REAL, seconds)  # the kernel ends us, in whatever code we are
    try:
      what = json.loads(line)
      if template is None:
        template, text = _compile(what), ''
      else:
        text = _whole(template, what)
      answer = {'text': text}
    except MemoryError:
      answer = {'error': f'it took more than {MEMORY >> 20} MiB of memory'}
    except Exception as error:  # whatever a template raises is its own refusal
      answer = {'error': f'{type(error).__name__}: {error}'[:1000]}
    answer = json.dumps(answer).encode() + b'\n'
    signal.setitimer(signal.ITIMER_REAL, 0)
    sys.stdout.buffer.write(answer)
    sys.stdout.buffer.flush()


def _compile(text: str) -> jinja2.Template:
  # As transformers has it, whose templates these are.
  environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols']
  )
  environment.filters['tojson'] = _to_json
  environment.globals['raise_exception'] = _refuse
  return environment.from_string(text)


def _whole(template: jinja2.Template, values: dict[str, Any]) -> str:
  parts, length = [], 0
  for part in template.generate(values):
    parts.append(part)
    length += len(part)
    if length > LONGEST:
      raise ValueError(f'it made more than {LONGEST} characters')
  return ''.join(parts)


def _refuse(message: str) -> NoReturn:
  raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
  return json.dumps(value, ensure_ascii=False, indent=indent)


if __name__ == '__main__':
  _main()
