"""Owners of pages under random use, and prompts that share their beginning."""

import numpy as np

from dsv3_jax.inference.pages import Pool, names


def test_names_stand_for_all_tokens_up_to_the_end_of_a_page_and_those_ahead():
  a = list(range(200))
  assert len(names(a, ahead=0)) == 3
  assert len(names(a[:192], ahead=0)) == 3 and len(names(a[:192], ahead=1)) == 2
  early, late = [7, *a[1:]], [*a[:64], 7, *a[65:]]
  assert not set(names(early, ahead=0)) & set(names(a, ahead=0))
  shared = [x == y for x, y in zip(names(late, ahead=0), names(a, ahead=0), strict=True)]
  assert shared == [True, False, False]
  assert names(late, ahead=1)[0] != names(a, ahead=1)[0]  # token 64 follows the first page


def test_a_page_keeps_its_name_until_its_place_is_needed_the_oldest_first():
  pool = Pool(3)
  one, two = pool.take(1), pool.take(1)
  pool.give_name(one[0], b'one')
  pool.give_name(two[0], b'two')
  pool.give_back(one)
  pool.give_back(two)
  assert pool.owned == 0
  assert pool.find([b'one', b'other']) == one
  assert len(pool.take(2)) == 2  # the third page, then the one longest out of use
  assert pool.find([b'one']) == [] and pool.find([b'two']) == two
  assert pool.take(2, shared=two) is None  # one page is left, and it is the shared one
  assert pool.take(1, shared=two) == two


def test_no_page_has_two_owners_and_none_is_lost_under_random_use():
  rng = np.random.default_rng(0)
  pool, held = Pool(20), []
  prompts = [rng.integers(0, 3, 64 * n).tolist() * 2 for n in (1, 1, 2, 3)]
  for _ in range(2000):
    if held and rng.random() < 0.5:
      pool.give_back(held.pop(rng.integers(len(held))))
    else:
      prompt = prompts[rng.integers(len(prompts))]
      wanted = names(prompt, ahead=0)
      shared = pool.find(wanted)
      pages = pool.take(len(wanted) + 1, shared)
      if pages is None:
        continue
      for page, name in zip(pages, wanted, strict=False):
        pool.give_name(page, name)
      held.append(pages)
    assert pool.owned == len({page for pages in held for page in pages})
    own = [page for pages in held for page in pages[-1:]]  # never named, so never shared
    assert len(own) == len(set(own))
  for pages in held:
    pool.give_back(pages)
  assert pool.available == pool.size
