"""Prefill and decode apart (3.4): prompts run in one engine, answers come from another.

Each has its own mesh, with its own number of devices for the experts: prompts want compute, answers want
many sequences at a time. What goes from one to the other is a `Handover`: the first token, the drafts
behind it, and the latent cache of the prompt, page by page. Pages that the decode engine has already, of a
prompt that begins alike, are not written again.

`Apart` is used as one `Engine`. The prompts may run in this process or, by the same methods, in another
(`serving.remote`). Here both take turns; there they run at the same time.
"""

from typing import Protocol

from dsv3_jax.config import ConfigError
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.requests import Event, Request, Stats


class Prompts(Protocol):
  """What runs prompts: an `Engine` with `prompts_only`, or one elsewhere."""

  idle: bool
  waiting: int
  running: int
  pages_owned: int

  def submit(self, request: Request) -> None: ...
  def check(self, request: Request) -> None: ...
  def cancel(self, request: Request) -> None: ...
  def step(self) -> list[Event]: ...
  def warm_up(self) -> None: ...


class Apart:
  """`decode` takes over what `prompts` have run. Raises ConfigError where the two cannot work together."""

  def __init__(self, prompts: Prompts, decode: Engine) -> None:
    self._prompts, self._decode = prompts, decode
    self.max_length = decode.max_length
    self.bytes_per_token = decode.bytes_per_token
    if isinstance(prompts, Engine):
      for name in ('max_length', 'bytes_per_token', 'drafts'):
        ours, theirs = getattr(decode, name), getattr(prompts, name)
        if ours != theirs:
          raise ConfigError(f'{name} = {theirs} for prompts: must be {ours}, as for decoding')

  def submit(self, request: Request) -> None:
    """Puts a request in the queue. Raises ConfigError for one that can never run."""
    self.check(request)
    self._prompts.submit(request)

  def check(self, request: Request) -> None:
    self._prompts.check(request)
    self._decode.check(request)

  def cancel(self, request: Request) -> None:
    self._prompts.cancel(request)
    self._decode.cancel(request)

  @property
  def stats(self) -> Stats:
    """Of the engine that decodes; prompts are counted there when they arrive."""
    return self._decode.stats

  @property
  def waiting(self) -> int:
    return self._prompts.waiting + self._decode.waiting

  @property
  def running(self) -> int:
    return self._prompts.running + self._decode.running

  @property
  def pages_owned(self) -> int:
    return self._prompts.pages_owned + self._decode.pages_owned

  @property
  def idle(self) -> bool:
    return self._prompts.idle and self._decode.idle

  def step(self) -> list[Event]:
    events = self._prompts.step() if not self._prompts.idle else []
    for event in events:
      if event.handover:
        self._decode.take_over(event.handover)
    return events + (self._decode.step() if not self._decode.idle else [])

  def warm_up(self) -> None:
    self._prompts.warm_up()
    self._decode.warm_up()
