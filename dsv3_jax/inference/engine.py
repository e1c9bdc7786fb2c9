"""Continuous batching: requests of any lengths join and leave between steps of two compiled programs.

A request waits for a free slot and for the pages of its prompt and all tokens it may get, so nobody who
runs is ever put back. Its prompt goes through in chunks, one of each device (or of `prompts` requests there) between two steps of
decoding: those who run never wait for more than a chunk. Pages of a prompt that are in the cache already are taken
over (`pages.Pool`), whole chunks of them.

A request's tokens are the same whatever else is in the engine. Both programs have one shape, in which every
row's arithmetic is its own: attention ends where the longest row ends and adds exact zeros before, experts
multiply rows in blocks of one size, random numbers follow seed and position. Chunks start at multiples of
the chunk, so a shared beginning is cut as it would be alone.

Where no prompt is on its way, `steps` steps of decoding go through in one call, whose tokens come together.
While requests wait for a slot, no more of them than surely nobody ends in.

The engine is for one thread. It deals in tokens; text and stop strings are its callers' (`stream`).
"""

import collections
import dataclasses
import time
from collections.abc import Collection

import jax
import numpy as np

from dsv3_jax.config import ConfigError
from dsv3_jax.inference import pages as cache_pages
from dsv3_jax.inference.balancing import Balancer
from dsv3_jax.inference.decode import Decoder
from dsv3_jax.inference.pages import Pool
from dsv3_jax.inference.requests import Event, Handover, Request, Stats, Token
from dsv3_jax.inference.rows import Filling
from dsv3_jax.inference.sizes import check
from dsv3_jax.inference.step import Chosen, How, Several
from dsv3_jax.kernels.mla_decode import PAGE

CHUNK = 2 * PAGE  # tokens of a prompt that go through at a time


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
  """Takes requests, and gives events of them, a step at a time.

  `eos_ids`: tokens that end a sequence. `slots`: sequences that decode together, on all devices. `pages`: of
  64 tokens, on every device; by default enough for all slots at full length. `chunk`: tokens of a prompt that
  go through at a time.
  `drafts`: tokens that the MTP module guesses ahead of each step; 0 for none. `cache`: 'plain', in the
  compute dtype, or 'fp8'. `max_length` defaults to the model's. `prompts_only`: ends a request behind its
  first token, by a handover that another engine can `take_over`. `balance_every`: steps after which experts
  are placed anew by what was chosen lately, where it helps (`balancing`); 0 for never. `steps`: of decoding,
  that a call of `step` takes at most. `dual_batch`: rows go through layers of experts as two halves out
  of step, so that one's exchange stands beside the other's compute. `prompts`: of which a device runs a chunk
  at a time; one by default, two with `dual_batch`.
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
    steps: int = 1,
    dual_batch: bool = False,
    prompts: int | None = None,
  ) -> None:
    c, ways = decoder.config, decoder.ways
    self.max_length = max_length or c.max_length
    self._table = -(-(self.max_length + drafts) // PAGE)  # pages of the longest sequence
    pages = pages or slots // ways * self._table
    prompts = 1 + dual_batch if prompts is None else prompts
    check(slots, ways, chunk, pages, drafts, c.mtp_depth, cache, steps, dual_batch, prompts)
    self.drafts = drafts
    self.stats = Stats()
    self._decoder, self._eos_ids, self._chunk = decoder, frozenset(eos_ids), chunk
    self._prompt = How(True, drafts, vocab_size, dual_batch=dual_batch)
    eos_ids = tuple(sorted(self._eos_ids))
    self._decode = How(False, drafts, vocab_size, eos_ids, steps, dual_batch)
    self._at_once = prompts
    # Those of the first device, then of the second.
    self._slots: list[_Slot | None] = [None] * slots
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
    slot_of: dict[int, int] = {}  # by row
    for way in range(len(self._pools)):
      mine = range(way * per_way, (way + 1) * per_way)
      todo = [i for i in mine if self._slots[i] and not self._slots[i].prefilled]
      # The one that has come furthest first: it frees its place in the queue soonest.
      todo.sort(key=lambda i: -self._slots[i].done)
      slot_of |= dict(enumerate(todo[: self._at_once], way * self._at_once))
    if not slot_of:
      return []
    rows = self._prompt_filling()
    for b, i in slot_of.items():
      slot = self._slots[i]
      part = slot.request.prompt[slot.done : slot.done + self._chunk]
      end = slot.done + len(part)
      behind = slot.request.prompt[end] if end < len(slot.request.prompt) else -1
      rows.put(b, part, slot.done, slot.pages, slot.request.how, behind)
    chosen = self._run_prompt(rows)
    events = []
    for b, i in slot_of.items():
      slot = self._slots[i]
      slot.done += int(rows.count_B[b])
      pool = self._pools[i // per_way]
      full = (slot.done - bool(self.drafts)) // PAGE  # with the token behind them run, or known
      for page, name in zip(slot.pages[:full], slot.names, strict=False):
        pool.give_name(page, name)
      if slot.prefilled:
        tokens = self._take(i, chosen, b)
        events.append(self._tell(i, tokens, chosen.drafts_BK[b]))
    return events

  def _prompt_filling(self) -> Filling:
    return Filling(len(self._pools) * self._at_once, self._chunk, self._table)

  def _run_decode(self) -> list[Event]:
    rows = Filling(len(self._slots), 1 + self.drafts, self._table)
    left_B = np.zeros(len(self._slots), np.int32)
    live = [i for i, slot in enumerate(self._slots) if slot and slot.prefilled]
    for i in live:
      slot = self._slots[i]
      drafts = slot.drafts[: slot.remaining - 1]  # a right one gives two tokens
      rows.put(i, [slot.tokens[-1], *drafts], len(slot.tokens) - 1, slot.pages, slot.request.how)
      left_B[i] = slot.remaining
    several = self._run_steps(rows, left_B, self._count_steps(live))
    events = []
    for i in live:
      tokens = []
      for s, count in enumerate(several.count_SB[:, i]):
        if count:
          self.stats.row_steps += 1
          self.stats.drafts += int(count) - 1
          tokens += self._take(i, several.chosen, (s, i))
      events.append(self._tell(i, tokens, several.chosen.drafts_BK[i]))
    return events

  def _count_steps(self, live: list[int]) -> int:
    if any(slot and not slot.prefilled for slot in self._slots):
      return 1
    if not self.waiting:
      return self._decode.most
    soonest = min(self._slots[i].remaining for i in live) // (1 + self.drafts)
    return max(1, min(soonest, self._decode.most))

  def warm_up(self) -> None:
    """Compiles both programs, by a step of each on empty rows."""
    self._run_prompt(self._prompt_filling())
    slots = len(self._slots)
    rows = Filling(slots, 1 + self.drafts, self._table)
    self._run_steps(rows, np.zeros(slots, np.int32), self._decode.most)
    self.stats = Stats()

  def _run_prompt(self, rows: Filling) -> Chosen:
    start = time.perf_counter()
    chosen, self._cache = self._decoder.step(self._prompt, rows.arrays(), self._cache)
    chosen = jax.device_get(chosen)
    self._saw(chosen.load_YE, 1)
    self.stats.prompt_seconds += time.perf_counter() - start
    return chosen

  def _run_steps(self, rows: Filling, left_B: np.ndarray, steps: int) -> Several:
    start = time.perf_counter()
    given = rows.arrays(), left_B, steps
    several, self._cache = self._decoder.several(self._decode, *given, self._cache)
    several = jax.device_get(several)
    self._saw(several.chosen.load_YE, int(several.count_SB.any(axis=1).sum()))
    self.stats.decode_seconds += time.perf_counter() - start
    return several

  def _saw(self, load_YE: np.ndarray, steps: int) -> None:
    if self.balancer:
      self.balancer.saw(load_YE, steps)

  def _take(self, i: int, chosen: Chosen, at: int | tuple[int, int]) -> list[Token]:
    """The tokens of one row, or of one step and row, go to slot i, up to what ends it."""
    slot = self._slots[i]
    right = int(chosen.accepted_B[at])
    ids, logprobs = chosen.tokens_BL[at].tolist(), chosen.logprob_BL[at].tolist()
    tokens = []
    for j in range(right + 1):
      top = ()
      if count := slot.request.top_logprobs:
        top_ids, top_logprobs = chosen.top_ids_BLT[at][j], chosen.top_logprobs_BLT[at][j]
        top = tuple(zip(top_ids[:count].tolist(), top_logprobs[:count].tolist(), strict=True))
      token = Token(ids[j], logprobs[j], top, drafted=j < right)
      tokens.append(token)
      slot.tokens.append(token.id)
      if self._finish(slot):
        break
    self.stats.tokens += len(tokens)
    self.stats.accepted += min(right, len(tokens))
    return tokens

  def _finish(self, slot: _Slot) -> str | None:
    if slot.tokens[-1] in self._eos_ids:
      return 'stop'
    return None if slot.remaining else 'length'

  def _tell(self, i: int, tokens: list[Token], drafts_K: np.ndarray) -> Event:
    """Slot i goes on behind its new tokens, or is freed."""
    slot = self._slots[i]
    finish = self._finish(slot)
    slot.drafts = drafts_K.tolist()
    handover = None if finish or not self._prompts_only else self._hand_over(i, tokens[0])
    if finish or handover:
      self._free(i)
    return Event(slot.request, tokens, finish, handover)

  def _free(self, i: int) -> None:
    pool = self._pools[i * len(self._pools) // len(self._slots)]
    pool.give_back(self._slots[i].pages)
    self._slots[i] = None
