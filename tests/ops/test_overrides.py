"""A function replaced for one thread for a while, and put back as it was."""

import inspect
import threading
from contextlib import ExitStack, contextmanager, nullcontext

import pytest

from spillway.ops.overrides import is_overridden, overridden, override_everywhere


class Base:
    @staticmethod
    def inherited(value):
        return value

    @staticmethod
    def plain(value):
        return value

    def method(self, value):
        return (self, value)


class Owner(Base):
    @staticmethod
    def plain(value):
        return value


def double(original, value):
    return 2 * original(value)


def add_one(original, value):
    return original(value) + 1


@contextmanager
def in_another_thread(enter, call):
    """Enters `enter` in a thread of its own, which stays in it until the block ends and then returns `call()`."""
    inside, leave, results = threading.Event(), threading.Event(), []

    def run():
        with enter:
            results.append(call())
            inside.set()
            leave.wait()
            results.append(call())

    thread = threading.Thread(target=run)
    thread.start()
    inside.wait()
    try:
        yield results
    finally:
        leave.set()
        thread.join()


def test_the_replacement_is_called_with_what_it_replaces_until_the_block_ends():
    with overridden(Owner, "plain", by=double):
        assert Owner.plain(3) == 6
    assert Owner.plain(3) == 3


def test_a_method_is_replaced_with_its_object():
    owner = Owner()
    with overridden(Owner, "method", by=lambda original, self, value: (original(self, value), "replaced")):
        assert owner.method(3) == ((owner, 3), "replaced")
    assert owner.method(3) == (owner, 3)


def test_attributes_are_afterwards_what_they_were_static_and_inherited_ones_too():
    before = dict(vars(Owner))
    with overridden(Owner, "plain", by=double), overridden(Owner, "inherited", by=double):
        assert Owner.inherited(3) == 6
    assert dict(vars(Owner)) == before  # `inherited` is not left on the class itself


def test_an_error_in_the_block_puts_the_original_back():
    before = vars(Owner)["plain"]
    with pytest.raises(KeyError), overridden(Owner, "plain", by=double):
        raise KeyError
    assert vars(Owner)["plain"] is before


def test_the_inner_of_two_gets_the_outer_one():
    with overridden(Owner, "plain", by=double):
        with overridden(Owner, "plain", by=add_one):
            assert Owner.plain(3) == 7  # 2 * 3 + 1
        assert Owner.plain(3) == 6
    assert Owner.plain(3) == 3


def test_other_threads_call_the_original():
    with overridden(Owner, "plain", by=double), in_another_thread(nullcontext(), lambda: Owner.plain(3)) as results:
        assert Owner.plain(3) == 6
    assert results == [3, 3]


def test_the_thread_that_came_first_may_leave_last():
    before = vars(Owner)["plain"]
    with in_another_thread(overridden(Owner, "plain", by=add_one), lambda: Owner.plain(3)) as results:
        with overridden(Owner, "plain", by=double):
            assert Owner.plain(3) == 6
        assert Owner.plain(3) == 3  # this thread has left, the other is still inside
    assert results == [4, 4]
    assert vars(Owner)["plain"] is before


def test_the_thread_that_came_first_may_leave_first():
    before = vars(Owner)["plain"]
    with ExitStack() as second:
        with overridden(Owner, "plain", by=double):
            results = second.enter_context(
                in_another_thread(overridden(Owner, "plain", by=add_one), lambda: Owner.plain(3))
            )
            assert Owner.plain(3) == 6
        assert Owner.plain(3) == 3
    assert results == [4, 4]
    assert vars(Owner)["plain"] is before


# --- for all threads --------------------------------------------------------------------------------------------------


class Loader:
    def method(self, value):
        return (type(self), value)

    @classmethod
    def of_class(cls, value):
        return (cls, value)


def twice(original, owner, value):
    return original(owner, 2 * value)


@pytest.mark.parametrize("name", ["method", "of_class"])
def test_every_thread_has_the_replacement_until_it_is_put_back(name):
    before, seen = vars(Loader)[name], []

    class Below(Loader):
        pass

    put_back = override_everywhere(Loader, name, by=twice)
    thread = threading.Thread(target=lambda: seen.append(getattr(Below(), name)(3)))
    thread.start()
    thread.join()
    assert seen == [(Below, 6)] and not is_overridden(Loader, name)
    put_back()
    assert vars(Loader)[name] is before and Below().method(3) == (Below, 3)


def test_a_replacement_of_one_thread_goes_before_that_of_all():
    before = Owner.plain
    put_back = override_everywhere(Owner, "plain", by=double)
    with overridden(Owner, "plain", by=add_one):
        assert is_overridden(Owner, "plain") and Owner.plain(5) == 11
        put_back()
        assert Owner.plain(5) == 6
    assert Owner.plain is before


def test_what_others_put_around_it_meanwhile_stays():
    def original(value):
        return value

    namespace = type("Namespace", (), {})()
    namespace.call = original
    put_back = override_everywhere(namespace, "call", by=double)
    ours = namespace.call

    def theirs(value):
        return ours(value) + 100

    namespace.call = theirs
    assert namespace.call(1) == 102
    put_back()
    assert namespace.call is theirs and namespace.call(1) == 101
    put_back = override_everywhere(namespace, "call", by=double)
    assert namespace.call(1) == 202
    put_back()
    assert namespace.call is theirs


def test_the_replacement_says_what_the_function_takes():
    put_back = override_everywhere(Base, "method", by=lambda original, *args: original(*args))
    try:
        assert list(inspect.signature(Base.method).parameters) == ["self", "value"]
    finally:
        put_back()
