"""A few real faults; `python tests/faults/faults.py` makes 200 of them."""

import pytest

from faults import Answer, Report, pauses_s, run


def check(report: Report) -> None:
    assert report.problems == []
    assert report.num_disturbed > 0


@pytest.mark.timeout(600)
def test_every_stream_says_what_it_would_have_said() -> None:
    report = run(3, 17, kinds=("kill", "close", "raise"))  # a seed that draws each of them
    assert report.num_faults == {"kill": 1, "stop": 0, "close": 1, "raise": 1}
    check(report)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("num_shard", [1, 2])
def test_bit_for_bit_in_half_precision(num_shard: int) -> None:
    """With 16 streams at a time, where each was alone before, and a death in their midst."""
    exact = ("--deterministic", "--dtype", "bfloat16", "--num-shard", str(num_shard))
    check(run(1, 3, *exact, kinds=("kill",)))


@pytest.mark.matrix
@pytest.mark.timeout(14400)
@pytest.mark.parametrize("num_shard", [1, 2])
def test_two_hundred_faults(num_shard: int) -> None:
    check(run(200, 2, "--num-shard", str(num_shard)))


def test_a_difference_would_be_seen() -> None:
    said = Answer({0: "ab"}, [1, 2], {0: [-0.5, -1.0]}, {0: ("ab", "length", 2)})
    close = Answer({0: "ab"}, [1, 2], {0: [-0.5001, -1.0]}, {0: ("ab", "length", 2)})
    assert said.difference(close) is None
    assert said.difference(said, 0.0) is None
    assert said.difference(close, 0.0) is not None
    for other in (
        Answer({0: "abb"}, [1, 2, 2], {0: [-0.5, -1.0, -1.0]}, {0: ("abb", "length", 3)}),  # doubled
        Answer({0: "a"}, [1], {0: [-0.5]}, {0: ("a", "length", 1)}),  # lost
        Answer({0: "ab"}, [1, 2], {0: [-0.5, -1.1]}, {0: ("ab", "length", 2)}),
        Answer({0: "ab"}, [1, 2], {0: [-0.5, -1.0]}, {}),  # never ended
        Answer({0: "ab"}, [1, 2], {}, {0: ("ab", "length", 2)}),
    ):
        assert said.difference(other) is not None


def test_the_pause_is_the_longest_gap_after_a_fault() -> None:
    assert pauses_s([0.0, 1.0, 2.0, 9.0, 10.0, 14.0, 15.0], [0.5, 1.5, 9.5]) == [1.0, 7.0, 4.0]
    assert pauses_s([3.0, 4.0], [1.0, 5.0]) == []  # before it began, after it ended
    assert pauses_s([], [1.0]) == []
