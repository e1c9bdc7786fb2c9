"""Continuous batching: requests of any lengths join and leave between steps of two compiled programs.

A request waits for a free slot and for the pages of its prompt and all tokens it may get, so nobody who
runs is ever put back. Its prompt goes through in chunks, one of each device between two steps of decoding:
those who run never wait for more than a chunk. Pages of a prompt that are in the cache already are taken
over (`pages.Pool`), whole chunks of them.

A request's tokens are the same whatever else is in the engine. Both programs have one shape, in which every
row's arithmetic is its own: attention ends where the longest row ends and adds exact zeros before, experts
multiply rows in blocks of one size, random numbers follow seed and position. Chunks start at multiples of
the chunk, so a shared beginning is cut as it would be alone.

The engine is for one thread. It deals in tokens; text and stop strings are its callers' (`stream`).
"""

import collections
import dataclasses
import time
from collections.abc import Collection, Sequence

import jax
import numpy as np

from dsv3_jax.config import ConfigError
from dsv3_jax.inference import pages as cache_pages
from dsv3_jax.inference.balancing import Balancer
from dsv3_jax.inference.decode import Chosen, Decoder, How
from dsv3_jax.inference.pages import Pool
from dsv3_jax.inference.rows import Filling
from dsv3_jax.inference.sampling import GREEDY, Sampling
from dsv3_jax.kernels.mla_decode import PAGE

CHUNK = 2 * PAGE  # tokens of a prompt that go through at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
  """One sequence to be continued; compared by identity."""

  prompt: Sequence[int]
  max_tokens: int
  sampling: Sampling = GREEDY
  sample: int = 0  # tells apart the samples of one prompt
  top_logprobs: int = 0

  @property
  def how(self) -> tuple[Sampling, int, int]:
    return self.sampling, self.sample, self.top_logprobs


@dataclasses.dataclass(frozen=True)
class Token:
  id: int
  logprob: float  # of the model as it is, whatever the temperature
  top: tuple[tuple[int, float], ...] = ()  # the most probable ones, as many as were asked for
  drafted: bool = False  # guessed by the MTP module, and right


@dataclasses.dataclass(frozen=True, eq=False)
class Handover:
  """A request whose prompt is in the cache, to go on in another engine."""

  request: Request
  token: Token  # the first one
  drafts: list[int]  # of those behind it
  pages: list[np.ndarray]  # [Y, 64, X] each: what the prompt's pages hold, the last one in part


@dataclasses.dataclass(frozen=True)
class Event:
  request: Request
  tokens: list[Token]
  finish: str | None  # 'stop': eos, the last token | 'length' | None: goes on
  handover: Handover | None = None  # where it goes on elsewhere


@dataclasses.dataclass
class Stats:
  """Sums since the engine was made."""

  requests: int = 0
  prompt_tokens: int = 0
  shared_tokens: int = 0  # of those, found in the cache
  tokens: int = 0
  row_steps: int = 0  # steps of decoding, each counted once for every sequence in it
  drafts: int = 0
  accepted: int = 0
  prompt_seconds: float = 0.0
  decode_seconds: float = 0.0

  @property
  def acceptance(self) -> float:
    """Share of the drafts that were right; of two in a row, the second counts where the first was not."""
    return self.accepted / max(self.drafts, 1)

  @property
  def tokens_per_step(self) -> float:
    """Tokens that a step of decoding gives a sequence: 1 without drafts."""
    return 1 + self.accepted / max(self.row_steps, 1)


@dataclasses.dataclass
class _Slot:
  """A request that runs."""

  request: Request
  pages: list[int]
  done: int  # tokens of the prompt that are in the cache
  names: list[bytes]
  tokens: list[int]  # prompt and all that came
  drafts: list[int]
  limit: int  # tokens that the request can get

  @property
  def prefilled(self) -> bool:
    return self.done == len(self.request.prompt)

  @property
  def remaining(self) -> int:
    return self.limit - (len(self.tokens) - len(self.request.prompt))


class Engine:
  """
  `eos_ids`: tokens that end a sequence. `slots`: sequences that decode together, on all devices. `pages`: of 64 tokens, on every device; by
  default enough for all slots at full length. `chunk`: tokens of a prompt that go through at a time.
  `drafts`: tokens that the MTP module guesses ahead of each step; 0 for none. `cache`: 'plain', in the
  compute dtype, or 'fp8'. `max_length` defaults to the model's. `prompts_only`: ends a request behind its
  first token, by a handover that another engine can `take_over`. `balance_every`: steps after which experts
  are placed anew by what was chosen lately, where it helps (`balancing`); 0 for never.
  """

  def __init__(
    self,
    decoder: Decoder,
    *,
    vocab_size: int,
    eos_ids: Collection[int],
    slots: int = 8,
    pages: int | None = None,
    chunk: int = CHUNK,
    drafts: int = 0,
    cache: str = 'plain',
    max_length: int | None = None,
    prompts_only: bool = False,
    balance_every: int = 0,
  ) -> None:
    c, ways = decoder.config, decoder.ways
    self.max_length = max_length or c.max_length
    self._table = -(-(self.max_length + drafts) // PAGE)  # pages of the longest sequence
    pages = pages or slots // ways * self._table
    _check(slots, ways, chunk, pages, drafts, c.mtp_depth, cache)
    self.drafts = drafts
    self.stats = Stats()
    self._decoder, self._eos_ids, self._chunk = decoder, frozenset(eos_ids), chunk
    self._prompt = How(prompt=True, drafts=drafts, vocab_size=vocab_size)
    self._decode = How(prompt=False, drafts=drafts, vocab_size=vocab_size)
    self._slots: list[_Slot | None] = [
      None
    ] * slots  # those of the first device, then of the second
    self._pools = [Pool(pages) for _ in range(ways)]
    self._waiting: collections.deque[Request] = collections.deque()
    self._arrived: collections.deque[Handover] = collections.deque()
    self._prompts_only = prompts_only
    self.balancer = Balancer(decoder, balance_every) if balance_every else None
    self._cache = decoder.empty(pages, drafts=drafts, fp8=cache == 'fp8')
    self.bytes_per_token = self._cache.bytes_per_token

  # ---- requests ----------------------------------------------------------------------------------

  def submit(self, request: Request) -> None:
    """Puts a request in the queue. Raises ConfigError for one that can never run."""
    self.check(request)
    self._waiting.append(request)

  def take_over(self, handover: Handover) -> None:
    """Puts a request whose prompt another engine has run before those that wait.

    Raises ConfigError for one that can never run, or whose pages are not as this engine's.
    """
    self.check(handover.request)
    count, right = -(-len(handover.request.prompt) // PAGE), self.page
    given = {(x.shape, x.dtype) for x in handover.pages}
    if len(handover.pages) != count or given != {right}:
      told = f'handover of {len(handover.pages)} pages {given}: must be {count} of {right}'
      raise ConfigError(f'{told}; are both engines of one model, cache and drafts?')
    self._arrived.append(handover)

  def check(self, request: Request) -> None:
    """Raises ConfigError for a request that can never run; any thread may ask."""
    n, longest = len(request.prompt), self.max_length
    if request.max_tokens < 1:
      raise ConfigError(f'max_tokens = {request.max_tokens}: must be at least 1')
    if not 0 < n < longest:
      raise ConfigError(
        f'prompt has {n} tokens: must have at least 1 and at most {longest - 1}, so that one more fits '
        f'into model.max_length = {longest}'
      )
    if self._need(request) > self._pools[0].size:
      together = n + self._limit(request)
      room = self._pools[0].size * PAGE - self.drafts
      raise ConfigError(f'prompt and answer of {together} tokens: the cache has room for {room}')

  def cancel(self, request: Request) -> None:
    """Ends a request, waiting or running; one that has ended already is left alone."""
    self._waiting = collections.deque(r for r in self._waiting if r is not request)
    self._arrived = collections.deque(h for h in self._arrived if h.request is not request)
    for i, slot in enumerate(self._slots):
      if slot and slot.request is request:
        self._free(i)

  @property
  def page(self) -> tuple[tuple[int, ...], np.dtype]:
    """Shape [Y, 64, X] and dtype of a page over all layers."""
    Y, _, *entry = self._cache.entries_YPMX.shape
    return (Y, *entry), self._cache.entries_YPMX.dtype

  @property
  def room(self) -> int:
    """Tokens that the longest request can have, prompt and answer."""
    return min(self.max_length, self._pools[0].size * PAGE - self.drafts)

  @property
  def waiting(self) -> int:
    return len(self._waiting) + len(self._arrived)

  @property
  def running(self) -> int:
    return sum(slot is not None for slot in self._slots)

  @property
  def pages_owned(self) -> int:
    """Pages that running requests hold, on all devices."""
    return sum(pool.owned for pool in self._pools)

  @property
  def idle(self) -> bool:
    return not self.waiting and not self.running

  # ---- steps -------------------------------------------------------------------------------------

  def step(self) -> list[Event]:
    """Lets requests in, runs a chunk of a prompt on each device, then decodes: what came of it."""
    self._admit()
    events = self._run_prompts()
    if any(slot and slot.prefilled for slot in self._slots):
      events += self._run_decode()
    return events

  def _admit(self) -> None:
    while self._arrived and self._place(self._arrived[0].request, self._arrived[0]):
      self._arrived.popleft()
    while self._waiting and self._place(self._waiting[0]):
      self._waiting.popleft()

  def _place(self, request: Request, handover: Handover | None = None) -> bool:
    """Gives the request a slot and pages on the device that has most of its beginning, then most room."""
    names = cache_pages.names(request.prompt, ahead=bool(self.drafts))
    per_way = len(self._slots) // len(self._pools)
    best = None
    for way, pool in enumerate(self._pools):
      first = way * per_way
      free = [i for i in range(first, first + per_way) if self._slots[i] is None]
      if free:
        found = pool.find(names)
        shared = found if handover else self._shareable(found, len(request.prompt))
        rank = len(shared), pool.available
        if best is None or rank > best[0]:
          best = rank, free[0], pool, shared
    if best is None:
      return False
    _, i, pool, shared = best
    taken = pool.take(self._need(request), shared)
    if taken is None:
      return False
    done = len(shared) * PAGE
    self._slots[i] = _Slot(
      request, taken, done, names, list(request.prompt), [], self._limit(request)
    )
    self.stats.requests += 1
    self.stats.prompt_tokens += len(request.prompt)
    self.stats.shared_tokens += done
    if handover:
      self._receive(i, pool, handover, len(shared))
    return True

  def _receive(self, i: int, pool: Pool, handover: Handover, shared: int) -> None:
    """Writes the pages that are not here yet; the slot goes on behind the first token."""
    slot, way = self._slots[i], self._pools.index(pool)
    for page, entries in list(zip(slot.pages, handover.pages, strict=False))[shared:]:
      self._cache = self._decoder.write_page(self._cache, way, page, entries)
    for page, name in zip(slot.pages, slot.names, strict=False):
      pool.give_name(page, name)
    slot.done = len(handover.request.prompt)
    slot.tokens.append(handover.token.id)
    slot.drafts = handover.drafts[: self.drafts]
    self.stats.tokens += 1

  def _hand_over(self, i: int, token: Token) -> Handover:
    slot, way = self._slots[i], i * len(self._pools) // len(self._slots)
    filled = slot.pages[: -(-slot.done // PAGE)]
    pages = [self._decoder.read_page(self._cache, way, page) for page in filled]
    return Handover(slot.request, token, slot.drafts, pages)

  def _shareable(self, found: list[int], prompt: int) -> list[int]:
    """Whole chunks, and not all of the prompt: its last token must run."""
    chunks = min(len(found) * PAGE, prompt - 1) // self._chunk
    return found[: chunks * self._chunk // PAGE]

  def _limit(self, request: Request) -> int:
    """Tokens that it can get."""
    return min(request.max_tokens, self.max_length - len(request.prompt))

  def _need(self, request: Request) -> int:
    """Pages: the MTP module runs ahead of the last token by as many as it drafts."""
    limit = 1 if self._prompts_only else self._limit(request)
    return -(-(len(request.prompt) + limit + self.drafts) // PAGE)

  def _run_prompts(self) -> list[Event]:
    per_way = len(self._slots) // len(self._pools)
    chosen_slots: list[int | None] = []
    for way in range(len(self._pools)):
      mine = range(way * per_way, (way + 1) * per_way)
      todo = [i for i in mine if self._slots[i] and not self._slots[i].prefilled]
      # The one that has come furthest first: it frees its place in the queue soonest.
      chosen_slots.append(max(todo, key=lambda i: self._slots[i].done) if todo else None)
    if all(i is None for i in chosen_slots):
      return []
    rows = Filling(len(chosen_slots), self._chunk, self._table)
    for b, i in enumerate(chosen_slots):
      if i is not None:
        slot = self._slots[i]
        part = slot.request.prompt[slot.done : slot.done + self._chunk]
        end = slot.done + len(part)
        behind = slot.request.prompt[end] if end < len(slot.request.prompt) else -1
        rows.put(b, part, slot.done, slot.pages, slot.request.how, behind)
    chosen = self._run(self._prompt, rows)
    events = []
    for b, i in enumerate(chosen_slots):
      if i is not None:
        slot = self._slots[i]
        slot.done += int(rows.count_B[b])
        pool = self._pools[i // per_way]
        full = (slot.done - bool(self.drafts)) // PAGE  # with the token behind them run, or known
        for page, name in zip(slot.pages[:full], slot.names, strict=False):
          pool.give_name(page, name)
        if slot.prefilled:
          events.append(self._take(i, chosen, b))
    return events

  def _run_decode(self) -> list[Event]:
    rows = Filling(len(self._slots), 1 + self.drafts, self._table)
    live = [i for i, slot in enumerate(self._slots) if slot and slot.prefilled]
    for i in live:
      slot = self._slots[i]
      slot.drafts = slot.drafts[: slot.remaining - 1]  # a right one gives two tokens
      rows.put(
        i, [slot.tokens[-1], *slot.drafts], len(slot.tokens) - 1, slot.pages, slot.request.how
      )
      self.stats.row_steps += 1
    chosen = self._run(self._decode, rows)
    return [self._take(i, chosen, i) for i in live]

  def warm_up(self) -> None:
    """Compiles both programs, by a step of each on empty rows."""
    self._run(self._prompt, Filling(len(self._pools), self._chunk, self._table))
    self._run(self._decode, Filling(len(self._slots), 1 + self.drafts, self._table))
    self.stats = Stats()

  def _run(self, how: How, rows: Filling) -> Chosen:
    start = time.perf_counter()
    chosen, self._cache = self._decoder.step(how, rows.arrays(), self._cache)
    chosen = jax.device_get(chosen)
    if self.balancer:
      self.balancer.saw(chosen.load_YE)
    name = 'prompt_seconds' if how.prompt else 'decode_seconds'
    setattr(self.stats, name, getattr(self.stats, name) + time.perf_counter() - start)
    return chosen

  def _take(self, i: int, chosen: Chosen, b: int) -> Event:
    """Row b's tokens go to slot i, which is freed where they are its last."""
    slot = self._slots[i]
    right = int(chosen.accepted_B[b])
    tokens, finish = [], None
    for j in range(right + 1):
      token = int(chosen.tokens_BL[b, j])
      top = zip(chosen.top_ids_BLT[b, j], chosen.top_logprobs_BLT[b, j], strict=True)
      top = [(int(t), float(p)) for t, p in list(top)[: slot.request.top_logprobs]]
      tokens.append(Token(token, float(chosen.logprob_BL[b, j]), tuple(top), drafted=j < right))
      slot.tokens.append(token)
      if token in self._eos_ids:
        finish = 'stop'
      elif not slot.remaining:
        finish = 'length'
      if finish:
        break
    self.stats.tokens += len(tokens)
    self.stats.drafts += len(slot.drafts)
    self.stats.accepted += min(right, len(tokens))
    slot.drafts = chosen.drafts_BK[b].tolist()
    handover = None if finish or not self._prompts_only else self._hand_over(i, tokens[0])
    if finish or handover:
      self._free(i)
    return Event(slot.request, tokens, finish, handover)

  def _free(self, i: int) -> None:
    pool = self._pools[i * len(self._pools) // len(self._slots)]
    pool.give_back(self._slots[i].pages)
    self._slots[i] = None


def _check(
  slots: int, ways: int, chunk: int, pages: int, drafts: int, mtp_depth: int, cache: str
) -> None:
  if slots < 1 or slots % ways:
    raise ConfigError(f'slots = {slots}: must be a positive multiple of the {ways} devices')
  if chunk < PAGE or chunk % PAGE:
    raise ConfigError(
      f'chunk = {chunk}: must be a positive multiple of {PAGE}, the tokens of a page'
    )
  if pages < 1:
    raise ConfigError(f'pages = {pages}: must be at least 1')
  if drafts < 0 or (drafts and not mtp_depth):
    right = 'at least 0' if drafts < 0 else '0: the model has no MTP module (model.mtp_depth = 0)'
    raise ConfigError(f'drafts = {drafts}: must be {right}')
  if cache not in ('plain', 'fp8'):
    raise ConfigError(f"cache = {cache!r}: must be 'plain' or 'fp8'")
