"""Tests of one group run in one worker: what one of them compiles or holds, the others need not."""

import pytest


@pytest.mark.xdist_group('scheduled')
def test_the_scheduler_knows_the_group_of_a_test(request):
  # pytest-xdist tells its scheduler by the test's name; with a pytest too new for it, no group holds.
  if hasattr(request.config, 'workerinput'):
    assert request.node.nodeid.endswith('@scheduled')
