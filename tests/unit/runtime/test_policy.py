"""When prompts are held back, and for how long: the gate alone, with a clock of its own."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from max.runtime.config import SchedulingConfig
from max.runtime.policy import Policy, PrefillGate, Prompts


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_settings_as_they_are_by_default_hold_nothing_back():
    assert Policy.of(SchedulingConfig()) == Policy()
    gate = PrefillGate(Policy())
    assert [gate.next_step(decoding, waiting) for decoding in range(3) for waiting in range(3)] == [Prompts()] * 9


def test_prompts_wait_while_enough_sequences_decode():
    gate = PrefillGate(Policy(decode_floor=2))
    assert [gate.next_step(decoding, 1).begun for decoding in (0, 1, 2, 3)] == [True, True, False, False]


def test_prompts_have_every_third_step_and_those_without_decoding():
    gate = PrefillGate(Policy(prompt_interval=3))
    assert [gate.next_step(1, 1).begun for _ in range(6)] == [False, False, True, False, False, True]
    assert gate.next_step(0, 1) == Prompts()


def test_new_prompts_gather_beside_decoding_but_not_for_ever():
    gate = PrefillGate(Policy(coalesced=3))
    assert [gate.next_step(1, waiting).new for waiting in (1, 2, 3)] == [False, False, True]
    assert [gate.next_step(1, 1).new for _ in range(4)] == [False, False, False, True], "three steps are enough"
    assert gate.next_step(1, 1).begun, "those that were begun go on"
    assert gate.next_step(0, 1).new, "nobody gains by waiting"
    gate = PrefillGate(Policy(coalesced=3, coalesced_steps=1))
    assert [gate.next_step(1, 1).new for _ in range(4)] == [False, True, False, True]


def test_new_prompts_wait_a_while_for_others():
    clock = Clock()
    gate = PrefillGate(Policy(delay_s=0.5), clock)
    assert gate.next_step(0, 0) == Prompts() and gate.delay_left_s() == 0
    assert gate.next_step(0, 1) == Prompts(new=False)
    clock.now = 0.4
    assert gate.next_step(0, 2) == Prompts(new=False)
    assert round(gate.delay_left_s(), 6) == 0.1
    clock.now = 0.5
    assert gate.next_step(0, 2) == Prompts() and gate.delay_left_s() == 0
    assert gate.next_step(0, 1) == Prompts(new=False), "the next ones wait too"


@given(
    st.builds(
        Policy,
        decode_floor=st.none() | st.integers(0, 3),
        prompt_interval=st.integers(1, 3),
        coalesced=st.integers(0, 4),
        coalesced_steps=st.integers(0, 4),
    ),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=30),
)
def test_without_decoding_no_prompt_is_held_back(policy: Policy, steps: list[tuple[int, int]]):
    gate = PrefillGate(policy)
    for decoding, waiting in steps:
        allowed = gate.next_step(decoding, waiting)
        assert allowed.begun or not allowed.new
        assert decoding or allowed == Prompts()
