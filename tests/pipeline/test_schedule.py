"""Text and files of schedules, in torch.distributed.pipelining's form; its own schedules read, and compared with ours."""

import csv

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as torch_schedules

from megapar.pipeline.check import check
from megapar.pipeline.orders import gpipe, interleaved_1f1b, one_f_one_b
from megapar.pipeline.passes import with_communication, with_sharding
from megapar.pipeline.schedule import COMPUTE, KINDS, Action, Schedule, live_activations, parse_schedule
from megapar.pipeline.zero_bubble import zero_bubble
from tests.pipeline.common import layouts


@pytest.mark.parametrize("kind", KINDS)
def test_an_action_is_written_as_torch_writes_it(kind) -> None:
    microbatch = None if kind in ("UNSHARD", "RESHARD", "REDUCE_GRAD") else 11
    action = Action(kind, 2, microbatch)
    theirs = torch_schedules._Action.from_str(str(action))
    assert (theirs.stage_index, theirs.computation_type.value, theirs.microbatch_index) == (2, kind, microbatch)
    assert str(theirs) == str(action)
    assert Action.parse(f" {action}\t") == action


@pytest.mark.parametrize("text", ["", "F3", "1X3", "1F", "1UNSHARD0", "-1F0", "1F3x", "1f3", "1SEND3", "(0F1)OVERLAP_F_B"])
def test_what_is_no_action(text) -> None:
    with pytest.raises(ValueError, match=f'"{text}"'.replace("(", r"\(").replace(")", r"\)")):
        Action.parse(text)


@settings(max_examples=100, deadline=None)
@given(layouts(8), st.booleans(), st.booleans())
def test_round_trip_through_text(layout, split, lowered) -> None:
    schedule = zero_bubble(*layout) if split else interleaved_1f1b(*layout)
    if lowered:
        schedule = with_sharding(with_communication(schedule), 1)
    assert parse_schedule(str(schedule)) == schedule


def test_round_trip_through_a_file_and_torch(tmp_path) -> None:
    schedule = with_sharding(with_communication(zero_bubble(3, 2, 5)), 1)
    schedule.save(tmp_path / "ours.csv")
    assert Schedule.load(tmp_path / "ours.csv") == schedule
    with open(tmp_path / "ours.csv", newline="") as file:  # as _load_csv does
        theirs = [[torch_schedules._Action.from_str(cell) for cell in row] for row in csv.reader(file)]
    with open(tmp_path / "theirs.csv", "w", newline="") as file:  # as _dump_csv does
        csv.writer(file).writerows(theirs)
    assert Schedule.load(tmp_path / "theirs.csv") == schedule


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0F0,0B0\n1F0,1Q0", r"line 2, cell 2: .1Q0. is not an action"),
        ("0F0,0B0\n0F1,0B1", r"0F1 is on rank 1, but stage 0 is on rank 0"),
        ("0F0,0B0\n2F0,2B0", "no rank computes stage 1"),
        ("0F0,(1Q0)OVERLAP_F_B", "line 1, cell 2"),
    ],
)
def test_bad_files_are_refused_with_their_name(tmp_path, text, words) -> None:
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(ValueError, match=words) as caught:
        Schedule.load(tmp_path / "s.csv")
    assert str(tmp_path / "s.csv") in str(caught.value)


def test_what_is_live() -> None:
    actions = parse_schedule("0F0,0F1,0I0,0F2,0W0,0I1,0W1,0B2").ranks[0]
    assert live_activations(actions) == [1, 2, 2, 3, 2, 2, 1, 0]
    assert live_activations(actions[:2]) == [0, 0]  # an evaluation keeps nothing


class FakeStage:
    """As much of a PipelineStage as torch's schedules look at."""

    def __init__(self, index: int, rank: int, pp: int, stages: int) -> None:
        self.stage_index, self.group_rank, self.group_size, self.num_stages = index, rank, pp, stages
        self.is_first, self.is_last, self.has_backward, self.submod = index == 0, index == stages - 1, True, None
        self.stage_index_to_group_rank: dict[int, int] = {}


def torchs(name: str, pp: int, chunks: int, microbatches: int):
    """A schedule object of torch for rank 0; ValueError where torch refuses."""
    if chunks == 1 and name in ("Schedule1F1B", "ScheduleGPipe"):
        return getattr(torch_schedules, name)(FakeStage(0, 0, pp, pp), microbatches)
    places = [0, 2 * pp - 1] if "V" in name else range(0, pp * chunks, pp)
    stages = [FakeStage(index, 0, pp, pp * chunks) for index in places]
    return getattr(torch_schedules, name)(stages, microbatches, loss_fn=lambda *_: None)


def texts(order) -> list[list[str]]:
    """An order of torch's without the steps in which a rank waits."""
    return [[str(action) for action in order[rank] if action is not None] for rank in sorted(order)]


@pytest.mark.parametrize("microbatches", [2, 4, 6, 8, 12])
@pytest.mark.parametrize(("pp", "chunks"), [(2, 2), (2, 3), (4, 2), (4, 1), (3, 2)])
def test_interleaved_order_is_torchs(pp, chunks, microbatches) -> None:
    """But for two things: with one chunk torch still warms up with twice the forwards, and with fewer micro-batches than ranks it makes a
    group of those there are, which is smaller than pp; then we drop phantoms of Megatron's order instead. Its rounds are our groups."""
    rounds = max(1, microbatches // pp)
    if microbatches % rounds:
        with pytest.raises(ValueError, match="multiple of the number of rounds"):
            torchs("ScheduleInterleaved1F1B", pp, chunks, microbatches)
        check(interleaved_1f1b(pp, chunks, microbatches))  # where torch refuses, we do not
        return
    theirs = torchs("ScheduleInterleaved1F1B", pp, chunks, microbatches)
    ours = interleaved_1f1b(pp, chunks, microbatches, max(pp, microbatches // rounds))
    if chunks > 1 and microbatches >= pp:
        assert ours.ranks_as_text() == texts(theirs.pipeline_order)
    else:
        assert [sorted(actions) for actions in ours.ranks_as_text()] == [sorted(actions) for actions in texts(theirs.pipeline_order)]


def test_1f1b_order_is_torchs_but_on_the_last_rank() -> None:
    """torch prints the last rank's forwards one too high (it runs them right): that file is refused with its missing action named."""
    theirs = texts(torchs("Schedule1F1B", 4, 1, 6)._get_pipeline_order())
    theirs = [[text for text in rank if "REDUCE_GRAD" not in text] for rank in theirs]
    ours = one_f_one_b(4, 6).ranks_as_text()
    assert ours[:3] == theirs[:3]
    assert theirs[3][0] == "3F1" and ours[3][0] == "3F0"
    with pytest.raises(ValueError, match="is missing on rank"):
        check(parse_schedule("\n".join(",".join(rank) for rank in theirs)))


def test_gpipe_order_is_torchs() -> None:
    theirs = texts(torchs("ScheduleGPipe", 3, 1, 5)._get_pipeline_order())
    assert gpipe(3, 1, 5).ranks_as_text() == [[text for text in rank if "REDUCE_GRAD" not in text] for rank in theirs]


@pytest.mark.parametrize("microbatches", [4, 8])
@pytest.mark.parametrize("name", ["Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"])
@pytest.mark.parametrize("form", ["compute_only", "compute_comms"])
def test_torchs_files_load_and_are_proven(tmp_path, name, microbatches, form) -> None:
    if name == "DualPipeV":
        microbatches += 4  # it takes no fewer than the stages
    schedule = torchs("Schedule" + name, 4, 2, microbatches)
    schedule._dump_csv(tmp_path / "theirs.csv", format=form)
    loaded = Schedule.load(tmp_path / "theirs.csv")
    assert loaded.stages == 8
    assert loaded.stage_to_rank == ((0, 1, 2, 3, 3, 2, 1, 0) if "V" in name else (0, 1, 2, 3) * 2)
    computed = loaded.only(COMPUTE)
    check(computed)
    check(with_communication(computed))
    if form == "compute_comms":
        # Rendezvous sends are more than torch asks for: it posts its receives, and a V hands over in place.
        check(loaded)
