"""The passes, against torch's, and what they promise."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as torch_schedules

from megapar.pipeline.check import check
from megapar.pipeline.orders import gpipe, interleaved_1f1b, one_f_one_b
from megapar.pipeline.passes import with_communication, with_sharding
from megapar.pipeline.schedule import COMPUTE, RECEIVES, SENDS, Schedule, parse_schedule
from megapar.pipeline.simulate import Costs
from megapar.pipeline.zero_bubble import split_backward
from tests.pipeline.common import layouts


def theirs(actions) -> list:
    return [torch_schedules._Action.from_str(str(action)) for action in actions]


@settings(max_examples=100, deadline=None)
@given(layouts(8), st.booleans(), st.integers(0, 4))
def test_sharding_is_torchs(layout, split, prefetch) -> None:
    """torch's pass with prefetch + 1 active stages, but for the order of several RESHARD in a row, which is that of a set there."""
    schedule = interleaved_1f1b(*layout)
    schedule = split_backward(schedule) if split else schedule
    for ours, actions in zip(with_sharding(schedule, prefetch).ranks, schedule.ranks, strict=True):
        lowered = torch_schedules._add_unshard_reshard(theirs(actions), prefetch + 1)
        lowered = torch_schedules._add_reduce_grad(lowered, schedule.microbatches)
        assert runs_sorted(map(str, ours)) == runs_sorted(map(str, lowered))


def runs_sorted(texts) -> list[str]:
    """Neighbouring RESHARD in the order of their stages, and REDUCE_GRAD before them."""
    result: list[str] = []
    run: list[str] = []
    for text in [*texts, ""]:
        if "RESHARD" in text or "REDUCE" in text:
            run.append(text)
        else:
            result += [*sorted(run), text]
            run = []
    return result


def test_sharding_by_hand() -> None:
    schedule = interleaved_1f1b(2, 2, 2)
    assert " ".join(with_sharding(schedule, 0).ranks_as_text()[1]) == (
        "1UNSHARD 1F0 1F1 1RESHARD 3UNSHARD 3F0 3B0 3F1 3B1 3REDUCE_GRAD 3RESHARD 1UNSHARD 1B0 1B1 1REDUCE_GRAD 1RESHARD"
    )
    assert " ".join(with_sharding(schedule, 1).ranks_as_text()[1]) == (
        "1UNSHARD 3UNSHARD 1F0 1F1 3F0 3B0 3F1 3B1 3REDUCE_GRAD 3RESHARD 1B0 1B1 1REDUCE_GRAD 1RESHARD"
    )


def test_gradients_reduced_at_each_micro_batch() -> None:
    for schedule in (one_f_one_b(2, 3), split_backward(one_f_one_b(2, 3))):
        found = with_sharding(schedule, 0, every_micro_batch=True)
        check(found)
        for actions in found.ranks:
            reduced = [before.kind for before, action in pairwise(actions) if action.kind == "REDUCE_GRAD"]
            assert reduced == ["W" if schedule.has("W") else "B"] * 3


@settings(max_examples=100, deadline=None)
@given(layouts(8), st.integers(0, 3))
def test_sharding_commutes_with_communication(layout, prefetch) -> None:
    schedule = interleaved_1f1b(*layout)
    first, last = with_sharding(with_communication(schedule), prefetch), with_communication(with_sharding(schedule, prefetch))
    assert check(first) == check(last)
    kinds = COMPUTE + SENDS + RECEIVES
    assert first.only(kinds) == last.only(kinds) == with_communication(schedule)
    for actions in first.ranks:
        whole = 0
        for action in actions:
            whole += (action.kind == "UNSHARD") - (action.kind == "RESHARD")
            assert whole <= prefetch + 1


@pytest.mark.parametrize("costs", [Costs(), Costs(0, 0, 0), Costs(1, 2, 1, 0.5)])
def test_messages_of_two_ranks_have_one_order_and_torch_can_run_them(costs) -> None:
    for schedule in (gpipe(3, 2, 4), one_f_one_b(4, 6), interleaved_1f1b(2, 2, 5), interleaved_1f1b(4, 2, 7), interleaved_1f1b(1, 3, 2)):
        for whole in (schedule, split_backward(schedule, costs)):
            sent = with_communication(whole, costs)
            for a in range(len(sent.ranks)):
                for b in range(len(sent.ranks)):
                    assert messages(sent, a, b, SENDS) == messages(sent, a, b, RECEIVES)
            actions = {rank: theirs(actions) for rank, actions in enumerate(sent.ranks)}
            torch_schedules._simulate_comms_compute(actions, lambda s, whole=whole: whole.stage_to_rank[s], whole.stages)


def messages(schedule: Schedule, source: int, to: int, kinds) -> list[tuple[str, int, int | None]]:
    """The messages from one rank to another, in the order of its sends or of the other's receives, named by who sends."""
    found = []
    for action in schedule.ranks[source if kinds is SENDS else to]:
        if action.kind in kinds:
            step = 1 if action.kind[-1] == "F" else -1
            sender = action.stage if kinds is SENDS else action.stage - step
            if schedule.stage_to_rank[sender] == source and schedule.stage_to_rank[sender + step] == to:
                found.append((action.kind[-1], sender, action.microbatch))
    return found


def test_a_receive_stands_ahead_of_need() -> None:
    """Rank 1 can post its second receive before it computes the first micro-batch's backward; rank 0 sends what it computed at once."""
    sent = with_communication(one_f_one_b(2, 2)).ranks_as_text()
    assert " ".join(sent[0]) == "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1"
    assert " ".join(sent[1]) == "1RECV_F0 1F0 1RECV_F1 1B0 1SEND_B0 1F1 1B1 1SEND_B1"


def test_nothing_is_sent_within_a_rank() -> None:
    assert with_communication(interleaved_1f1b(1, 3, 4)) == interleaved_1f1b(1, 3, 4)
    v = parse_schedule("0F0,3F0,3B0,0B0\n1F0,2F0,2B0,1B0")
    sent = with_communication(v)
    check(sent)
    crossings = [(0, 1), (2, 3)]
    assert sum(a.kind in SENDS for actions in sent.ranks for a in actions) == 2 * len(crossings)


def test_a_pass_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="has sends and receives already"):
        with_communication(with_communication(one_f_one_b(2, 2)))
    with pytest.raises(ValueError, match="has sharding actions already"):
        with_sharding(with_sharding(one_f_one_b(2, 2), 1), 1)
    with pytest.raises(ValueError, match="prefetch=-1"):
        with_sharding(one_f_one_b(2, 2), -1)
