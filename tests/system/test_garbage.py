"""Collections look at new objects alone, and the caller's freeze stays."""

from __future__ import annotations

import gc
import weakref

import pytest

from stride_captum.system.garbage import cheap_collections


class Loop:
    def __init__(self) -> None:
        self.itself = self


@pytest.mark.slow
def test_garbage_that_is_made_inside_is_collected_inside_and_older_garbage_afterwards() -> None:
    old = Loop()
    before = weakref.ref(old)
    with cheap_collections():
        del old
        new = weakref.ref(Loop())
        gc.collect()
        assert new() is None
        assert before() is not None
    gc.collect()
    assert before() is None


def test_it_ends_with_the_outermost_also_after_an_exception() -> None:
    def fail() -> None:
        with cheap_collections():
            with cheap_collections():
                assert gc.get_freeze_count() > 0
            assert gc.get_freeze_count() > 0
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert gc.get_freeze_count() == 0


def test_what_the_caller_has_frozen_stays_frozen() -> None:
    gc.freeze()
    try:
        with cheap_collections():
            pass
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
