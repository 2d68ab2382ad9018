"""kvarn.patching: what stands in for a method is called in its place, once, and stands aside for nothing."""

import pytest

from kvarn.patching import is_wrapped, wrap_once


class Engine:
    """A class of somebody else's."""

    def double(self, n):
        return 2 * n

    @classmethod
    def name(cls):
        return cls.__name__


@pytest.fixture
def engine():
    """A subclass, so that nothing outlives a test."""
    return type("Faster", (Engine,), {})


def one_more(original, engine, n):
    return original(engine, n) + 1


def test_method_is_called_through_what_stands_in_however_often_it_was_wrapped(engine):
    for _ in range(2):
        wrap_once(engine, "double", one_more)
    assert engine().double(3) == 7
    assert Engine().double(3) == 6


def test_classmethod_stays_one_and_knows_its_class(engine):
    wrap_once(engine, "name", lambda original, cls: f"{original(cls)}!")
    assert engine.name() == engine().name() == "Faster!"


def test_method_that_another_package_replaced_is_not_taken_for_ours(engine):
    assert not is_wrapped(engine.double)
    wrap_once(engine, "double", one_more)
    assert is_wrapped(engine.double)
    engine.double = Engine.double
    assert not is_wrapped(engine.double)


def test_method_that_is_not_there_is_an_error(engine):
    with pytest.raises(AttributeError):
        wrap_once(engine, "triple", one_more)
