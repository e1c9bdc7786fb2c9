"""Serves a model with the OpenAI API: `python -m dsv3_jax.serve WORKDIR` (extra `[serve]`).

Listens on 127.0.0.1 unless --host says otherwise. DSV3_API_KEY in the environment is asked of clients.
The chat template that came with the weights, where there is one, makes prompts of chats; it runs in a
sandbox. A chat in the browser stands at /. SIGTERM and Ctrl-C let what has been asked end, within --grace.

Prompts may run apart, on a mesh of their own:

  python -m dsv3_jax.serve WORKDIR --prompts_only --port=9000 --local=8
  python -m dsv3_jax.serve WORKDIR --prefill=127.0.0.1:9000 --local=32
"""

import argparse
import hashlib
import json
import math
import os
import pathlib
import signal
import sys
import threading
import types
from collections.abc import Sequence

import uvicorn

from dsv3_jax import config, console, mesh
from dsv3_jax.config import ConfigError
from dsv3_jax.inference.apart import Apart
from dsv3_jax.inference.decode import Decoder
from dsv3_jax.inference.engine import Engine
from dsv3_jax.serving import chat, prompts
from dsv3_jax.serving.app import Limits, Server
from dsv3_jax.serving.remote import RemotePrompts
from dsv3_jax.serving.worker import Worker
from dsv3_jax.training import workdir
from dsv3_jax.training.checkpoint import CheckpointError


def main(arguments: Sequence[str] | None = None) -> int:
  """Exit code: 0, or 2 after one line about what cannot work."""
  return console.run('serve', _parse, _run, arguments, file='workdir', told=(CheckpointError,))


def _run(args: argparse.Namespace) -> None:
  if args.prompts_only:
    _run_prompts(args)
  else:
    _Listener(args, server(args)).run()


def _run_prompts(args: argparse.Namespace) -> None:
  loaded = _load(args)
  engine = _engine(args, loaded)
  engine.warm_up()
  with prompts.listener(engine, _identity(loaded), args.host, args.port) as made:
    print(f'{loaded.name}: prompts on {args.host}:{args.port}', file=sys.stderr, flush=True)
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=made.shutdown).start())
    made.serve_forever()


class _Listener(uvicorn.Server):
  """Stops listening at a signal; what runs has `grace` seconds to end by itself."""

  def __init__(self, args: argparse.Namespace, served: Server) -> None:
    self._served, self._grace = served, args.grace
    super().__init__(
      uvicorn.Config(
        served.app(),
        host=args.host,
        port=args.port,
        log_level='warning',
        timeout_keep_alive=30,
        timeout_graceful_shutdown=math.ceil(args.grace) + 5,  # after all have been told
      )
    )

  def handle_exit(self, sig: int, frame: types.FrameType | None) -> None:
    self._served.end(self._grace)
    super().handle_exit(sig, frame)


def server(args: argparse.Namespace) -> Server:
  """Loaded and compiled."""
  folder = pathlib.Path(args.workdir)
  template, variables = chat.read(folder)
  if args.waiting < 1:
    raise ConfigError(f'waiting = {args.waiting}: must be at least 1')
  loaded = _load(args)
  made = _engine(args, loaded)
  if args.prefill:
    made = Apart(RemotePrompts(args.prefill, made, _identity(loaded)), made)
  made.warm_up()
  name = args.name or folder.resolve().name
  print(f'{loaded.name} as {name!r} on http://{args.host}:{args.port}', file=sys.stderr)
  key = os.environ.get('DSV3_API_KEY')
  limits = Limits(args.body_bytes, args.seconds)
  talk = chat.Chat(loaded.tokenizer, template, variables)
  return Server(Worker(made, args.waiting), loaded.tokenizer, talk, name, key, limits)


def _load(args: argparse.Namespace) -> workdir.Loaded:
  sizes = config.Mesh(data=args.data, node=args.node, local=args.local, zero=0)
  return workdir.load(args.workdir, step=args.step, average=args.average, sizes=sizes)


def _engine(args: argparse.Namespace, loaded: workdir.Loaded) -> Engine:
  c = loaded.config.model
  return Engine(
    Decoder(c, mesh.make_mesh(loaded.config.mesh), loaded.model, redundant=args.redundant),
    vocab_size=loaded.tokenizer.vocab_size,
    eos_ids=chat.ends(pathlib.Path(args.workdir), loaded.tokenizer),
    slots=args.slots,
    pages=args.pages,
    chunk=args.chunk,
    drafts=min(1, c.mtp_depth) if args.drafts is None else args.drafts,
    cache=args.cache,
    prompts_only=args.prompts_only,
    balance_every=args.balance_every,
    steps=args.steps,
    dual_batch=args.dual_batch,
    prompts=args.prompts,
  )


def _identity(loaded: workdir.Loaded) -> str:
  """What two processes compare before they work together."""
  model = json.dumps(config.flatten(loaded.config.model), sort_keys=True, default=str)
  digest = hashlib.blake2b(model.encode(), digest_size=8).hexdigest()
  return f'{loaded.name}, model {digest}, tokenizer {loaded.tokenizer.fingerprint}'


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
  parser = console.Parser(
    'python -m dsv3_jax.serve', description='Serves a model with the OpenAI API.'
  )
  add = parser.add_argument
  add('workdir', help='folder of a training run, or of imported weights')
  add('--slots', type=int, default=16, help='sequences that run together (%(default)s)')
  add('--pages', type=int, help='of 64 tokens in the cache (enough for all slots at full length)')
  add('--chunk', type=int, default=128, help='tokens of a prompt at a time (%(default)s)')
  add('--prompts', type=int, help='whose chunks a device runs at a time (1; 2 with --dual_batch)')
  add('--drafts', type=int, help='tokens that the MTP module guesses ahead (1 if there is one)')
  add('--steps', type=int, default=4, help='of decoding in one call, at most (%(default)s)')
  dual = 'two halves of the rows out of step: exchanges of one beside the work of the other'
  add('--dual_batch', action='store_true', help=dual)
  add('--cache', default='plain', help="'plain' or 'fp8' (%(default)s)")
  for axis in ('data', 'node', 'local'):
    add(f'--{axis}', type=int, default=1, help='devices on this axis of the mesh (%(default)s)')
  add('--redundant', type=int, default=0, help='copies of experts in each layer (%(default)s)')
  add('--balance_every', type=int, default=0, help='steps until experts are placed anew (0: never)')
  add('--step', type=int, help='checkpoint to take (the newest)')
  add('--average', action='store_true', help='take the average of the weights')
  add('--host', default='127.0.0.1', help='address to listen on (%(default)s)')
  add('--port', type=int, default=8000, help='(%(default)s)')
  add('--name', help='of the model, for clients (the name of the folder)')
  add('--prompts_only', action='store_true', help='run prompts for servers on this host and port')
  add('--prefill', help='HOST:PORT of a process with --prompts_only (prompts run here)')
  add('--waiting', type=int, default=256, help='requests that may wait (%(default)s)')
  add('--seconds', type=float, default=600.0, help='that a request may take (%(default)s)')
  add('--body_bytes', type=int, default=1_000_000, help='of a request (%(default)s)')
  add('--grace', type=float, default=30.0, help='seconds to end in, at a signal (%(default)s)')
  return parser.parse_args(arguments)


if __name__ == '__main__':
  sys.exit(main())
