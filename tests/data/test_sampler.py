import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapar.data.sampler import Sampler, split_held_out

lengths = st.integers(1, 7)


def tokens_of(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.int32)


@given(num_tokens=st.integers(8, 90), sequence_length=lengths, seed=st.integers(0, 2**70), epoch=st.integers(0, 3))
def test_an_epoch_visits_every_sample_once(num_tokens: int, sequence_length: int, seed: int, epoch: int) -> None:
    sampler = Sampler(tokens_of(num_tokens), sequence_length, seed)
    count = sampler.samples_per_epoch
    batch = sampler.batch(epoch * count, count)
    assert batch.dtype == np.int64 and batch.shape == (count, sequence_length + 1)
    # Token values are positions: sorted by start, the samples are the slots, and their targets are consecutive.
    batch = batch[np.argsort(batch[:, 0])]
    assert batch[:, 1:].ravel().tolist() == list(range(1, count * sequence_length + 1))
    assert (batch[:, 0] == np.arange(count) * sequence_length).all()
    assert num_tokens - 1 - count * sequence_length < sequence_length


@given(first=st.integers(0, 60), count=st.integers(1, 60), seed=st.integers(0, 9))
def test_any_order_of_access_gives_the_same_samples(first: int, count: int, seed: int) -> None:
    sampler = Sampler(tokens_of(50), 4, seed)
    whole = sampler.batch(first, count)
    singles = {number: sampler.batch(number, 1)[0].tolist() for number in reversed(range(first, first + count))}
    assert whole.tolist() == [singles[number] for number in range(first, first + count)]
    assert Sampler(tokens_of(50), 4, seed).batch(first, count).tolist() == whole.tolist()


def test_epochs_and_seeds_differ() -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        return tuple(Sampler(tokens_of(401), 4, seed).batch(epoch * 100, 100)[:, 0].tolist())

    orders = [order(seed, epoch) for seed in (0, 1, 11) for epoch in (0, 1, 11)]
    orders += [order(111, 1), order(1, 111)]
    assert len(set(orders)) == len(orders)
    assert orders[0] != tuple(sorted(orders[0]))


def test_order_is_pinned() -> None:
    # A run resumed under another numpy version must see the data that it would have seen.
    assert Sampler(tokens_of(11), 1, seed=1234).batch(0, 20)[:, 0].tolist() == [
        1,
        3,
        6,
        5,
        8,
        0,
        7,
        4,
        2,
        9,
        9,
        8,
        7,
        0,
        2,
        4,
        6,
        1,
        5,
        3,
    ]


def test_global_random_state_is_neither_read_nor_moved() -> None:
    np.random.seed(0)
    first = Sampler(tokens_of(50), 4, 0).batch(0, 12)
    drawn = np.random.random()
    np.random.seed(0)
    assert np.random.random() == drawn
    assert Sampler(tokens_of(50), 4, 0).batch(0, 12).tolist() == first.tolist()


def test_exactly_one_sample_is_enough_and_one_token_less_is_refused() -> None:
    sampler = Sampler(tokens_of(5), 4, 0)
    assert sampler.samples_per_epoch == 1
    assert sampler.batch(0, 3).tolist() == [[0, 1, 2, 3, 4]] * 3
    with pytest.raises(ValueError, match=r"corpus has 4 tokens, one sample needs 5: give more text or lower data.seq"):
        Sampler(tokens_of(4), 4, 0)


@pytest.mark.parametrize("sequence_length", [0, -3])
def test_sequence_length_below_one_is_refused(sequence_length: int) -> None:
    with pytest.raises(ValueError, match=rf"sequence_length is {sequence_length}, .*at least 1: raise it"):
        Sampler(tokens_of(9), sequence_length, 0)


@pytest.mark.parametrize(("first", "count"), [(-1, 2), (0, 0)])
def test_bad_batch_is_refused(first: int, count: int) -> None:
    with pytest.raises(ValueError, match=rf"sample {first} and has {count}, .*correct first and count"):
        Sampler(tokens_of(9), 2, 0).batch(first, count)


@given(num_tokens=st.integers(1, 500), held_out=st.floats(0.01, 0.6), test=st.sampled_from([0.0, 0.1, 0.39]))
def test_split_holds_out_the_tail(num_tokens: int, held_out: float, test: float) -> None:
    parts = split_held_out(tokens_of(num_tokens), held_out, test)
    assert np.concatenate(parts).tolist() == list(range(num_tokens))
    assert len(parts[0]) == int(num_tokens * (1 - (held_out + test)))
    assert len(parts[2]) == num_tokens - int(num_tokens * (1 - test))


@pytest.mark.parametrize(
    ("held_out", "test"), [(0.0, 0), (1.0, 0), (-0.1, 0), (5, 0), (float("nan"), 0), (0.5, 0.5), (0.5, -0.1), (0.5, float("nan"))]
)
def test_shares_that_leave_nothing_are_refused(held_out: float, test: float) -> None:
    with pytest.raises(ValueError, match=rf"held_out is {held_out} and data.test {test}, .*use for example 0.05"):
        split_held_out(tokens_of(10), held_out, test)
