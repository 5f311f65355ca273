"""What is wrong with a schedule is said in one sentence, with the place marked in its table."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapar.pipeline.check import check, replay
from megapar.pipeline.orders import interleaved_1f1b, one_f_one_b
from megapar.pipeline.passes import with_communication, with_sharding
from megapar.pipeline.schedule import Schedule, parse_schedule
from megapar.pipeline.zero_bubble import split_backward, zero_bubble
from tests.pipeline.common import layouts

GOOD = "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1"


@pytest.mark.parametrize(
    ("text", "words", "marks"),
    [
        (GOOD.replace("0F1,0B0", "0B0,0F1"), None, []),
        (GOOD.replace("1F0,1B0", "1B0,1F0"), "deadlock: rank 0 at 0B0 waits for 1I0 .or B.; rank 1 at 1B0 waits for 1F0", [">0B0", ">1B0"]),
        (GOOD.replace("1F0,1B0,1F1", "1F1,1F0,1B0").replace("0F0,0F1,0B0", "0F0,0B0,0F1"), "deadlock: rank 0 at 0B0", [">0B0", ">1F1"]),
        (GOOD.replace("0B1", "0B0"), "0B0 is there twice", [">0B0", ">0B0"]),
        (GOOD.replace(",0B1", ""), "0B1 is missing on rank 0", [">0F1"]),
        (GOOD.replace("1F1,", ""), "1F1 is missing on rank 1", [">1B1"]),
        (GOOD.replace("0B1", "0I1"), "0W1 is missing on rank 0", None),
        (GOOD.replace("0B1", "0B1,0W1"), "0W1 has no place in the schedule: its gradients are computed by B or by I and W", [">0W1"]),
        (GOOD.replace("0B1", "0W1,0I1"), "deadlock: rank 0 at 0W1 waits for 0I1", [">0W1"]),
        (GOOD.replace("0B1", "0B1,0SEND_B1"), "missing on rank", None),
        (GOOD.replace("0F0", "1SEND_B0,0F0"), "1SEND_B0 is on rank 0, which does not hold stage 1", [">1SEND_B0"]),
        ("0F0,0F1,0B0,0B1\n1F0,1F1", "is missing on rank 1", None),
    ],
)
def test_the_failing_action_is_marked(text, words, marks) -> None:
    if words is None:
        assert check(parse_schedule(text))
        return
    with pytest.raises(ValueError, match=words) as caught:
        check(parse_schedule(text))
    assert "rank 0" in str(caught.value).splitlines()[1]
    if marks is not None:
        assert sorted(re.findall(r">\w+", str(caught.value))) == sorted(marks)


def test_the_table() -> None:
    with pytest.raises(ValueError) as caught:
        check(parse_schedule(GOOD.replace("1F0,1B0", "1B0,1F0")))
    assert str(caught.value).splitlines()[1:] == [
        "  step  rank 0 rank 1",
        "     0   0F0   >1B0",
        "     1   0F1    1F0",
        "     2  >0B0    1F1",
        "     3   0B1    1B1",
    ]


def test_a_long_table_shows_what_is_near() -> None:
    text = str(one_f_one_b(2, 40)).replace("1F20,1B20", "1B20,1F20")
    with pytest.raises(ValueError) as caught:
        check(parse_schedule(text))
    lines = str(caught.value).splitlines()
    assert ">1B20" in str(caught.value)
    assert "(28 steps before)" in lines[2]
    assert "steps after)" in lines[-1]


def swapped(schedule: Schedule, rank: int, one: str, other: str) -> Schedule:
    """Two actions of a rank in each other's place."""
    exchange = {one: other, other: one}
    rows = schedule.ranks_as_text()
    rows[rank] = [exchange.get(text, text) for text in rows[rank]]
    return parse_schedule("\n".join(",".join(row) for row in rows))


def test_sends_that_wait_for_each_other() -> None:
    """Harmless with buffered sends, a deadlock with rendezvous: both ranks send before either receives."""
    sent = with_communication(one_f_one_b(2, 3))
    assert check(sent) == [2, 1]
    edited = swapped(sent, 0, "0SEND_F1", "0RECV_B0")
    with pytest.raises(ValueError, match="rank 0 at 0RECV_B0 waits for 1SEND_B0; rank 1 at 1RECV_F1 waits for 0SEND_F1") as caught:
        check(edited)
    assert sorted(re.findall(r">\w+", str(caught.value))) == [">0RECV_B0", ">1RECV_F1"]
    text = "0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0B0,0RECV_B1,0B1\n1RECV_F0,1F0,1B0,1SEND_B0,1RECV_F1,1F1,1B1,1SEND_B1"
    with pytest.raises(ValueError, match="rank 0 at 0SEND_F1 waits for 1RECV_F1 to be reached; rank 1 at 1SEND_B0 waits for 0RECV_B0"):
        check(parse_schedule(text))


@settings(max_examples=200, deadline=None)
@given(st.data(), layouts(6), st.booleans())
def test_two_actions_exchanged_by_hand(data, layout, split) -> None:
    """Whatever two actions of a rank are exchanged, the proof ends: it holds, or it names a deadlock and marks where each rank stands."""
    schedule = interleaved_1f1b(*layout)
    schedule = with_communication(split_backward(schedule) if split else schedule)
    rank = data.draw(st.integers(0, len(schedule.ranks) - 1))
    actions = list(schedule.ranks[rank])
    one, other = (data.draw(st.integers(0, len(actions) - 1)) for _ in range(2))
    actions[one], actions[other] = actions[other], actions[one]
    edited = Schedule((*schedule.ranks[:rank], tuple(actions), *schedule.ranks[rank + 1 :]), schedule.stage_to_rank)
    try:
        check(edited)
    except ValueError as error:
        assert "deadlock: " in str(error)
        assert ">" in str(error)
    else:
        order = [edited.ranks[r][index] for r, index in replay(edited)]
        assert sorted(map(str, order)) == sorted(str(a) for actions in schedule.ranks for a in actions)
        place = {action: number for number, action in enumerate(order)}
        for action, at in place.items():
            if action.kind in ("I", "B"):
                assert place[action._replace(kind="F")] < at
            if action.kind == "W":
                assert place[action._replace(kind="I")] < at


def test_limit() -> None:
    schedule = zero_bubble(3, 1, 6)
    assert max(check(schedule, limit=3)) == 3
    with pytest.raises(ValueError, match=r"0F2 is the activation number 3 that rank 0 keeps, 2 are allowed"):
        check(schedule, limit=2)
    with pytest.raises(ValueError, match="that rank 1 keeps, 2 are allowed"):
        check(schedule, limit=[3, 2, 3])


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("0UNSHARD,0F0", "0F0", "0F0 computes with parameters of stage 0 that are sharded"),
        ("0UNSHARD,0F0", "0UNSHARD,0UNSHARD,0F0", "0UNSHARD gathers parameters that are whole already"),
        ("0UNSHARD,0F0", "0RESHARD,0UNSHARD,0F0", "0RESHARD drops parameters that are not gathered"),
        ("0B1,0REDUCE_GRAD", "0REDUCE_GRAD,0B1", "0REDUCE_GRAD reduces gradients before the last 1 of them"),
        ("0B1,0REDUCE_GRAD", "0B1", "0REDUCE_GRAD is missing on rank 0"),
        ("0B1,0REDUCE_GRAD", "0B1,0REDUCE_GRAD,0REDUCE_GRAD", "0REDUCE_GRAD reduces gradients that were reduced already"),
    ],
)
def test_sharding_that_is_wrong(old, new, words) -> None:
    text = str(with_sharding(one_f_one_b(2, 2), 0))
    assert old in text
    check(parse_schedule(text))
    with pytest.raises(ValueError, match=words):
        check(parse_schedule(text.replace(old, new)))
