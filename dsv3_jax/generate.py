"""Continues text with a trained model: `python -m dsv3_jax.generate WORKDIR --prompt='def '`.

  python -m dsv3_jax.generate WORKDIR --prompt='def ' --prompt='class ' --samples=2
  python -m dsv3_jax.generate WORKDIR --prompt=- < beginning.py
  python -m dsv3_jax.generate WORKDIR --prefix='def add(a, b): return ' --suffix=' # the sum'

The new text goes to stdout as it comes; of several sequences the first one that is not complete, each
under a line with its number. One line on stderr says how fast it was, compilation left out. Runs on
one device, whatever the model was trained on.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence

from dsv3_jax import console, mesh
from dsv3_jax.config import ConfigError
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.inference.decode import Decoder
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.inference.stream import TextStream, engine_for, stream
from dsv3_jax.training import workdir
from dsv3_jax.training.checkpoint import CheckpointError


def main(arguments: Sequence[str] | None = None) -> int:
  """Exit code: 0, or 2 after one line about what cannot work."""
  return console.run('generate', _parse, _run, arguments, file='workdir', told=(CheckpointError,))


def _run(args: argparse.Namespace) -> None:
  sampling = Sampling(args.temperature, args.top_p, args.seed)
  # ---- model and prompts -------------------------------------------------------------------------
  loaded = workdir.load(args.workdir, step=args.step, average=args.average)
  c = loaded.config.model
  drafts = min(1, c.mtp_depth) if args.drafts is None else args.drafts
  decoder = Decoder(c, mesh.make_mesh(loaded.config.mesh), loaded.model)
  prompts = _prompts(args, loaded.tokenizer, loaded.config.run.prompt)
  sizes = {'max_tokens': args.max_tokens, 'samples': args.samples}
  engine = engine_for(decoder, loaded.tokenizer, prompts, **sizes, drafts=drafts)
  engine.warm_up()
  # ---- tokens ------------------------------------------------------------------------------------
  page = _Page(len(prompts), args.samples, loaded.tokenizer)
  for tokens in stream(engine, prompts, sampling=sampling, **sizes):
    page.push(tokens)
  page.close()
  # ---- figures -----------------------------------------------------------------------------------
  stats = engine.stats
  computed = stats.prompt_tokens - stats.shared_tokens
  figures = [loaded.name, f'prefill {_rate(computed, stats.prompt_seconds)}']
  decoded = stats.row_steps + stats.accepted
  if decoded:
    figures.append(f'decode {_rate(decoded, stats.decode_seconds)}')
  if stats.drafts:
    figures.append(f'{stats.acceptance:.0%} of {stats.drafts:,} drafts right')
  figures.append(f'cache {engine.bytes_per_token:,} bytes per token')
  if max(map(len, prompts)) + args.max_tokens > c.max_length:
    figures.append(f'no sequence goes beyond model.max_length = {c.max_length} tokens')
  print(', '.join(figures), file=sys.stderr)


def _rate(tokens: int, seconds: float) -> str:
  return f'{tokens:,} tokens at {tokens / seconds:,.0f} tokens/s'


# ---- arguments -----------------------------------------------------------------------------------


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
  parser = console.Parser(
    'python -m dsv3_jax.generate', description='Continues text with a trained model.'
  )
  add = parser.add_argument
  add('workdir', help='folder of a training run, or of imported weights')
  add(
    '--prompt', action='append', help="text to continue, several times for a batch; '-' reads stdin"
  )
  add('--prefix', help='infill: the text before the gap')
  add('--suffix', help='infill: the text behind the gap')
  add('--max_tokens', type=int, default=200, help='tokens of each sequence (%(default)s)')
  add('--temperature', type=float, default=0.8, help='0 is greedy (%(default)s)')
  add('--top_p', type=float, default=0.95, help='mass of the nucleus (%(default)s)')
  add('--seed', type=int, default=0, help='of the random numbers (%(default)s)')
  add('--samples', type=int, default=1, help='sequences for each prompt (%(default)s)')
  add('--drafts', type=int, help='tokens that the MTP module guesses ahead (1 if there is one)')
  add('--step', type=int, help='checkpoint to take (the newest)')
  add('--average', action='store_true', help='take the average of the weights')
  args = parser.parse_args(arguments)
  if (args.prefix is None) != (args.suffix is None):
    given, other = ('prefix', 'suffix') if args.suffix is None else ('suffix', 'prefix')
    raise ConfigError(f"--{given} without --{other}: infill wants both; either may be ''")
  if args.prefix is not None and args.prompt:
    raise ConfigError(
      '--prompt with --prefix and --suffix: continue a text or fill a gap, not both'
    )
  return args


def _prompts(args: argparse.Namespace, t: Tokenizer, default: str) -> list[list[int]]:
  """As documents begin in training: bos, then text or the prefix-suffix-middle form up to the middle."""
  infill = args.prefix is not None
  texts = [args.prefix, args.suffix] if infill else args.prompt or [default]
  texts = [_stdin() if text == '-' and not infill else text for text in texts]
  for text in texts:
    if any('\ud800' <= c <= '\udfff' for c in text):  # bytes of the command line that are not text
      raise ConfigError(f'{text!r}: is not UTF-8')
  ids = t.encode_batch(texts)
  if infill:
    return [[t.bos_id, t.fim_begin_id, *ids[0], t.fim_hole_id, *ids[1], t.fim_end_id]]
  return [[t.bos_id, *prompt] for prompt in ids]


def _stdin() -> str:
  try:
    return sys.stdin.buffer.read().decode('utf-8')
  except UnicodeDecodeError as error:
    raise ConfigError(f'--prompt=-: stdin is not UTF-8 at byte {error.start}') from None


# ---- output --------------------------------------------------------------------------------------


class _Page:
  """Sequences below each other: one is shown as it grows, those behind it wait for its end."""

  def __init__(self, prompts: int, samples: int, tokenizer: Tokenizer) -> None:
    names = itertools.product(range(1, prompts + 1), range(1, samples + 1))
    self._titles = [f'==> prompt {p}, sample {s} <==\n' for p, s in names]
    if len(self._titles) == 1:
      self._titles = ['']
    self._texts = [TextStream(tokenizer) for _ in self._titles]
    self._waiting = list(self._titles)
    self._ended = [False] * len(self._titles)
    self._shown = 0  # the sequence that is growing on the page

  def push(self, new: Sequence[list[int] | None]) -> None:
    for i, tokens in enumerate(new):
      if tokens is not None:
        self._waiting[i] += ''.join(map(self._texts[i].push, tokens))
      elif not self._ended[i]:
        self._end(i)
    self._show()

  def close(self) -> None:
    for i, ended in enumerate(self._ended):
      if not ended:
        self._end(i)
    self._show()

  def _end(self, i: int) -> None:
    self._ended[i] = True
    self._waiting[i] += self._texts[i].close() + '\n'

  def _show(self) -> None:
    while self._shown < len(self._ended):
      sys.stdout.write(self._waiting[self._shown])
      self._waiting[self._shown] = ''
      if not self._ended[self._shown]:
        break
      self._shown += 1
    sys.stdout.flush()


if __name__ == '__main__':
  sys.exit(main())
