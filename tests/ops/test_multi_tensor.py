"""The tables of a list of tensors: against plain loops, beyond 32 bits without memory, uploaded once."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megapar.ops import multi_tensor
from megapar.ops.multi_tensor import ALIGNMENT, CHUNK, NORM_CHUNK, adamw_rows, chunks_of, grad_norm_rows, groups_of, upload
from megapar.ops.specs import Spec, check_adamw
from megapar.ops.step_state import StepState

CPU = torch.device("cpu")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def strides_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))


def spec(address: int, dtype: torch.dtype, *shape: int, device: torch.device = CPU) -> Spec:
    return Spec(address, dtype, device, shape, strides_of(shape))


@given(st.lists(st.integers(0, 5 * CHUNK), max_size=8), st.sampled_from([CHUNK, NORM_CHUNK]))
def test_chunks_cover_every_element_once(numels, chunk):
    tensors = [7 + 3 * i for i in range(len(numels))]
    expected = [[t, k] for t, n in zip(tensors, numels, strict=True) for k in range(n) if k * chunk < n]
    found = chunks_of(tensors, numels, chunk)
    assert found.dtype == torch.int32 and found.tolist() == expected


def test_fresh_scalars_upload_nothing():
    """As apex's capturable functions make them at every call."""
    lists = [[torch.zeros(5, device="cpu")] for _ in range(5)]
    before = multi_tensor._adamw.cache_info().misses
    for _ in range(3):
        state = StepState.create(1, device="cpu")
        multi_tensor.adamw_tables(lists[0], lists[1], [], *lists[3:], state.scalars, state.counters, [0], seed=None, ids=(), places=())
        kept = state  # so that the next one lies elsewhere
    assert multi_tensor._adamw.cache_info().misses == before + 1 and kept.counters.shape == (1, 3)


def test_chunks_beyond_32_bits():
    numel = 2**33 + 1
    found = chunks_of([3, 4], [numel, 1], CHUNK)
    assert len(found) == 2**33 // CHUNK + 2
    assert found[-2].tolist() == [3, 2**33 // CHUNK] and found[-1].tolist() == [4, 0]


@given(st.lists(st.tuples(st.sampled_from(FLOATS), st.integers(0, 2**34), st.integers(1, 2**40)), max_size=6))
def test_partial_sums_lie_one_after_the_other(tensors):
    grads = tuple(spec(2 * address, dtype, numel) for dtype, numel, address in tensors)
    table, partials = grad_norm_rows(grads)
    first = 0
    for row, grad in zip(table.tolist(), grads, strict=True):
        assert row == [grad.address, grad.numel, first]
        first += math.ceil(grad.numel / NORM_CHUNK)
    assert partials == first and table.shape == (len(grads), 3)


entry = st.tuples(
    st.sampled_from(FLOATS), st.sampled_from(FLOATS), st.sampled_from(FLOATS[:2]), st.integers(0, 3 * CHUNK), st.integers(1, 2**44)
)


@settings(deadline=None)
@given(st.lists(entry, max_size=6), st.booleans(), st.booleans())
def test_groups_and_rows_of_adamw(entries, with_masters, drawn):
    """Each element in one chunk of one group, of its dtypes and alignment; each address in its column."""
    lists: list[list[Spec]] = [[], [], [], [], []]
    for i, (weight, grad, moment, numel, address) in enumerate(entries):
        for column, dtype in zip(lists, (weight, grad, torch.float32, moment, moment), strict=True):
            column.append(spec(2 * address + (i << 50), dtype, numel))
    if not with_masters:
        lists[2] = []
    fixed = tuple(map(tuple, lists))
    covered = []
    for group in groups_of(fixed[:4], CHUNK, CPU):
        for i, k in group.chunks.table.tolist():
            here = [column[i] if column else None for column in fixed[:4]]
            assert group.dtypes == tuple(x.dtype if x else None for x in here)
            assert group.aligned == all(x is None or x.address % ALIGNMENT == 0 for x in here)
            covered.append((i, k))
    assert sorted(covered) == [(i, k) for i, x in enumerate(lists[0]) for k in range(math.ceil(x.numel / CHUNK))]
    ids, places = ([50 + i for i in range(len(entries))], list(range(3 * len(entries)))) if drawn else ((), ())
    table = adamw_rows(fixed, [9] * len(entries), ids, places)
    for i, row in enumerate(table.tolist()):
        numel = lists[0][i].numel
        place = [3 * i, 3 * i + 1, 3 * i + 2] if drawn else [0, max(numel, 1), max(numel, 1)]
        assert row == [column[i].address if column else 0 for column in lists] + [numel, 9, 50 + i if drawn else 0, *place]


@given(st.lists(st.integers(1, 4), max_size=4), st.permutations(range(5)), st.integers(1, 3))
def test_a_spec_says_what_the_tensor_says(shape, order, step):
    x = torch.empty(*shape, 3)[..., ::step]
    x = x.permute([d for d in order if d < x.dim()])
    found = Spec.of(x)
    assert found.contiguous == x.is_contiguous() and found.numel == x.numel()
    last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    assert found.extent == (x.data_ptr(), x.data_ptr() + 4 * (last + 1))


def adamw_lists(n: int) -> list[list[torch.Tensor]]:
    return [[torch.zeros(100 + i) for i in range(n)] if k != 2 else [] for k in range(5)]


def tables(lists, scalars, counters, rows=(0, 0)):
    return multi_tensor.adamw_tables(*lists, scalars, counters, rows, seed=None, ids=(), places=())


def test_a_second_step_uploads_nothing(monkeypatch):
    """With fresh gradients their table, not the chunks; and not the total of grad_norm_, which each step makes anew."""
    uploads = []
    monkeypatch.setattr(multi_tensor, "upload", lambda table, device: uploads.append(table.dtype) or upload(table, device))
    lists, state = adamw_lists(2), (torch.zeros(6, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64))
    first = tables(lists, *state)
    assert uploads == [torch.int64, torch.int32]
    assert tables(lists, *state).table is first.table and len(uploads) == 2
    old, lists[1] = lists[1], [torch.zeros_like(g) for g in lists[1]]
    assert tables(lists, *state).table is not first.table and uploads[2:] == [torch.int64]
    totals = [torch.zeros(3, dtype=torch.float64) for _ in range(2)]
    (a, _), (b, _) = (multi_tensor.grad_norm_tables(total, old) for total in totals)
    assert a.table is b.table
    counts = [torch.ones((), dtype=torch.float64) for _ in range(2)]
    steps = [multi_tensor.step_state_table(*state, total, count, [0], [0.9], [0.99]) for total, count in zip(totals, counts, strict=True)]
    assert steps[0] is steps[1] and steps[0].table.tolist() == [[0, 0.9, 0.99]]


def test_a_tensor_that_moved_or_changed_is_seen():
    """Also where the allocator gives the same address to another shape."""
    state = (torch.zeros(6, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64))
    lists = adamw_lists(2)
    whole = tables(lists, *state)
    shorter = [[x[:50] for x in column] for column in lists]
    assert tables(shorter, *state).table.table[:, 5].tolist() == [50, 50] and whole.table.table[:, 5].tolist() == [100, 101]
    with pytest.raises(ValueError, match=r"row 1 must lie in \[0, 1\)"):
        tables(lists, *state, rows=(0, 1))


def test_gradients_that_are_not_contiguous_are_copied_and_kept():
    lists = [[torch.zeros(4, 6)] for _ in range(5)]
    lists[1], lists[2] = [torch.arange(24.0).view(6, 4).t()], []
    found = tables(lists, torch.zeros(6, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64), rows=(0,))
    assert found.table.table[0, 1] == found.keep[0].data_ptr() != lists[1][0].data_ptr()
    assert torch.equal(found.keep[0], lists[1][0]) and found.keep[0].is_contiguous()


def test_a_capture_refuses_what_it_would_have_to_upload(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="take one step on the same tensors"):
        upload(torch.zeros(1), torch.device("cuda", 0))


def test_a_table_that_a_graph_reads_is_kept(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    table = multi_tensor.Uploaded(torch.zeros(1), stream=object())
    before = multi_tensor._kept.cache_info().currsize
    assert table.on_this_stream() is table.table
    assert multi_tensor._kept.cache_info().currsize == before + 1


def test_tensors_on_two_devices():
    gpu = torch.device("cuda", 0)
    state = (spec(0, torch.float64, 6, device=gpu), spec(0, torch.float64, 1, 3, device=gpu))
    lists = [(spec(1000 * k, torch.float32, 8, device=gpu),) for k in range(5)]
    lists[2] = ()
    check_adamw(tuple(lists), *state, [0], False, (), ())
    for k, name in ((1, "grads"), (3, "exp_avgs"), (4, "exp_avg_sqs")):
        moved = [*lists[:k], (lists[k][0]._replace(device=CPU),), *lists[k + 1 :]]
        with pytest.raises(ValueError, match=rf"{name}\[0\] is on cpu and weights\[0\] on cuda:0: move one"):
            check_adamw(tuple(moved), *state, [0], False, (), ())


def test_large_tensors_that_overlap():
    """By one element past 2^31."""
    state = (spec(0, torch.float64, 6), spec(0, torch.float64, 1, 3))
    n = 2**31 + 5
    addresses = [k << 40 for k in range(5)]
    lists = [(spec(address, torch.float32, n),) for address in addresses]
    lists[2] = ()
    check_adamw(tuple(lists), *state, [0], False, (), ())
    lists[3] = (spec(addresses[0] + 4 * (n - 1), torch.float32, n),)
    with pytest.raises(ValueError, match=r"exp_avgs\[0\] shares memory with weights\[0\]"):
        check_adamw(tuple(lists), *state, [0], False, (), ())
