"""Admission: a slot for each open stream, and whatever happens each slot is freed exactly once."""

from __future__ import annotations

import resource
import threading
from typing import TYPE_CHECKING, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay import errors
from relay.gate.slots import Admission, Lease, streams_that_files_allow

if TYPE_CHECKING:
    from collections.abc import Callable


def nobody() -> None:
    """Called when a lease is granted late, for tests that do not wait."""


def never() -> NoReturn:
    raise AssertionError("woken without having waited")


def test_as_many_as_there_are_slots_are_granted_at_once() -> None:
    admission = Admission(2)
    leases = [admission.request("a", never), admission.request("b", never), admission.request("c", nobody)]
    assert [lease.granted for lease in leases] == [True, True, False]
    assert admission.open == 2


def test_a_lease_given_back_goes_to_whoever_waited_longest() -> None:
    admission = Admission(1)
    woken: list[str] = []
    first = admission.request("a", never)
    second = admission.request("b", lambda: woken.append("second"))
    third = admission.request("c", lambda: woken.append("third"))
    first.release()
    assert (second.granted, third.granted, woken) == (True, False, ["second"])
    late = admission.request("d", nobody)
    assert not late.granted, "nobody overtakes the queue"
    assert admission.open == 1
    second.release()
    assert (third.granted, late.granted, woken) == (True, False, ["second", "third"])


def test_who_leaves_the_queue_gets_nothing() -> None:
    admission = Admission(1)
    first = admission.request("a", never)
    gone = admission.request("b", never)
    third = admission.request("c", nobody)
    gone.release()
    first.release()
    assert not gone.granted
    assert third.granted
    third.release()
    assert admission.open == 0


def test_releasing_twice_frees_once() -> None:
    admission = Admission(2, per_client=2)
    kept = admission.request("a", never)
    lease = admission.request("a", never)
    for _ in range(3):
        lease.release()
    assert admission.open == 1
    waiting = [admission.request(client, nobody) for client in "abc"]
    assert [one.granted for one in waiting] == [True, False, False]
    for _ in range(2):
        waiting[1].release()  # out of the queue, twice
    kept.release()
    assert waiting[2].granted
    assert admission.open == 2


def test_one_client_has_so_many_and_the_others_do_not_feel_it() -> None:
    admission = Admission(10, per_client=2)
    leases = [admission.request("a", never), admission.request("a", never)]
    with pytest.raises(errors.TooMany, match="RELAY_MAX_STREAMS_PER_CLIENT") as caught:
        admission.request("a", never)
    assert caught.value.code == "too_many_streams"
    assert dict(caught.value.headers())["Retry-After"] in ("1", "2")
    assert admission.request("b", never).granted
    leases[0].release()
    assert admission.request("a", never).granted
    assert admission.open == 3


def test_who_waits_counts_as_one_of_the_clients() -> None:
    admission = Admission(1, per_client=1)
    admission.request("a", never)
    waiting = admission.request("b", nobody)
    with pytest.raises(errors.TooMany):
        admission.request("b", never)
    waiting.release()
    assert not admission.request("b", nobody).granted


def test_clients_that_have_gone_are_forgotten() -> None:
    admission = Admission(1, per_client=3)
    for number in range(1000):
        lease, second = admission.request(f"10.0.0.{number}", never), admission.request(f"10.0.0.{number}", nobody)
        second.release()
        lease.release()
    assert admission._of_client == {}
    assert not admission._queue


def test_the_error_of_a_full_relay() -> None:
    error = Admission(7).full()
    assert error.status == 503
    assert dict(error.headers())["Retry-After"] in ("1", "2")
    assert "7 streams" in error.message


@given(
    st.integers(1, 3),
    st.integers(0, 2),
    st.lists(st.tuples(st.sampled_from(["request", "release"]), st.integers(0, 9)), max_size=60),
)
def test_it_does_what_a_plain_list_does(maximum: int, per_client: int, steps: list[tuple[str, int]]) -> None:
    """The model: all who have not released, in the order in which they came; the first `maximum` are in."""
    admission = Admission(maximum, per_client)
    present: list[tuple[str, Lease]] = []
    everybody: list[Lease] = []
    woken: list[Lease] = []
    should_have_woken: list[Lease] = []

    def waker() -> Callable[[], None]:
        return lambda: woken.append(lease)

    for what, number in steps:
        if what == "request":
            client = str(number % 3)
            refused = bool(per_client) and sum(1 for name, _ in present if name == client) >= per_client
            try:
                lease = admission.request(client, waker())
            except errors.TooMany:
                assert refused
                continue
            assert not refused
            present.append((client, lease))
            everybody.append(lease)
            assert lease.granted is (len(present) <= maximum)
        elif everybody:
            one = everybody[number % len(everybody)]
            places = [place for place, (_, other) in enumerate(present) if other is one]
            if places and places[0] < maximum < len(present):
                should_have_woken.append(present[maximum][1])
            present = [pair for pair in present if pair[1] is not one]
            one.release()
        assert admission.open == min(len(present), maximum)
        assert [lease.granted for _, lease in present] == [place < maximum for place in range(len(present))]
        assert len(woken) == len(should_have_woken)


def test_threads_that_take_and_release_leave_nothing_behind() -> None:
    admission = Admission(3, per_client=40)
    most = 0

    def one(client: str) -> None:
        nonlocal most
        for _ in range(100):
            granted = threading.Event()
            lease = admission.request(client, granted.set)
            assert lease.granted or granted.wait(20)
            most = max(most, admission.open)
            releasing = [threading.Thread(target=lease.release) for _ in range(2)]
            for thread in releasing:
                thread.start()
            for thread in releasing:
                thread.join()

    threads = [threading.Thread(target=one, args=(str(number % 2),)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert admission.open == 0
    assert most <= 3
    assert admission._of_client == {}


@pytest.mark.parametrize(
    ("soft", "streams"),
    [
        pytest.param(1024, 462, id="the-usual-1024"),
        pytest.param(65_536, 32_718, id="65536"),
        pytest.param(100, 1, id="too-few"),
        pytest.param(0, 1, id="none"),
        pytest.param(resource.RLIM_INFINITY, 1_000_000, id="unlimited"),
    ],
)
def test_streams_that_files_allow(monkeypatch: pytest.MonkeyPatch, soft: int, streams: int) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, resource.RLIM_INFINITY))
    assert streams_that_files_allow() == streams
