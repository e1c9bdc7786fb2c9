"""An untrained model on disk, and servers of it on a port of this machine, whose engine can be held still."""

import contextlib
import dataclasses
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import uvicorn

from dsv3_jax import config, mesh, serve
from dsv3_jax.data import tokenizer
from dsv3_jax.inference.engine import Engine
from dsv3_jax.serving.app import Server
from dsv3_jax.training import state, workdir
from dsv3_jax.training.checkpoint import Checkpointer


@dataclasses.dataclass(frozen=True)
class Running:
  url: str
  port: int
  served: Server
  uvicorn: uvicorn.Server
  thread: threading.Thread
  open: threading.Event  # while it is clear, the engine stands before its next step

  @property
  def engine(self) -> Engine:
    return self.served._worker.engine

  def empty_soon(self) -> None:
    self.soon(lambda: not (self.engine.pages_owned or self.engine.running or self.engine.waiting))

  def soon(self, true: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not true():
      assert time.monotonic() < end
      time.sleep(0.01)


@pytest.fixture(scope='package')
def folder(tmp_path_factory):
  made = tmp_path_factory.mktemp('run')
  d = config.debug(config.default())
  d.model.precision = 'fp32'
  d.model.init_std = 0.3
  d.model.moe.dispatch.update(
    payload='plain', combine='plain'
  )  # a mesh computes what one device does
  c = config.freeze(d)
  workdir.claim(made, c)
  tokenizer.train(['x'], 262).save(made / workdir.TOKENIZER)
  with Checkpointer(made / workdir.CHECKPOINTS, c.checkpoint) as checkpointer:
    checkpointer.save(1, state.init(c, mesh.make_mesh(c.mesh)), {})
  return made


@pytest.fixture(scope='package')
def running(folder):
  """Context manager: `dsv3_jax.serve` with these flags; `limits` replaces some of the server's."""

  @contextlib.contextmanager
  def run(*flags: str, key: str = '', **limits: float) -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch:
      patch.setenv('DSV3_API_KEY', key)
      arguments = [str(folder), '--slots=8', '--chunk=64', '--name=small', *flags]
      made = serve.server(serve._parse(arguments))
    made._limits = dataclasses.replace(made._limits, **limits)
    still, step = threading.Event(), made._worker.engine.step
    still.set()
    made._worker.engine.step = lambda: (still.wait(), step())[1]
    with socket.socket() as s:
      s.bind(('127.0.0.1', 0))
      port = s.getsockname()[1]
    listener = uvicorn.Server(uvicorn.Config(made.app(), port=port, log_level='error'))
    thread = threading.Thread(target=listener.run)
    thread.start()
    while not listener.started:
      time.sleep(0.01)
    try:
      yield Running(f'http://127.0.0.1:{port}', port, made, listener, thread, still)
    finally:
      still.set()
      listener.should_exit = True
      thread.join()

  return run
