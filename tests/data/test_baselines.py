import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapar.data.baselines import bigram_loss, unigram_loss

Loss = Callable[[np.ndarray, np.ndarray, int], float]

VOCAB_SIZE = 5
token_lists = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=30)


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


def test_unigram_by_hand() -> None:
    # Counts 3, 2, 0 of 5 tokens over 3 ids; the first held-out token is context only.
    loss = unigram_loss(ids(0, 1, 0, 1, 0), ids(2, 0, 1, 2), vocab_size=3)
    assert loss == pytest.approx(-(math.log(4 / 8) + math.log(3 / 8) + math.log(1 / 8)) / 3)


def test_bigram_by_hand() -> None:
    # Pairs 01 10 02 20 01: context 0 has N = 3, T = 2; context 1 has N = 1, T = 1; context 3 is never seen.
    train = ids(0, 1, 0, 2, 0, 1)
    p = {0: 4 / 10, 1: 3 / 10, 2: 2 / 10, 3: 1 / 10}
    expected = {
        (0, 1): 3 / 5 * 2 / 3 + 2 / 5 * p[1],
        (0, 3): 3 / 5 * 0 + 2 / 5 * p[3],
        (1, 0): 1 / 2 * 1 + 1 / 2 * p[0],
        (3, 2): p[2],
    }
    for pair, probability in expected.items():
        assert bigram_loss(train, ids(*pair), vocab_size=4) == pytest.approx(-math.log(probability))
    loss = bigram_loss(train, ids(1, 0, 1), vocab_size=4)
    assert loss == pytest.approx(-(math.log(expected[1, 0]) + math.log(expected[0, 1])) / 2)


def test_last_train_token_is_no_context() -> None:
    # Token 1 ends the text and starts no pair, so after it the unigram stands alone.
    assert bigram_loss(ids(0, 1), ids(1, 0), vocab_size=2) == pytest.approx(-math.log(2 / 4))


@given(train=token_lists, context=st.integers(0, VOCAB_SIZE - 1))
def test_probabilities_sum_to_one_after_any_context(train: list[int], context: int) -> None:
    for loss in (unigram_loss, bigram_loss):
        total = sum(math.exp(-loss(ids(*train), ids(context, word), VOCAB_SIZE)) for word in range(VOCAB_SIZE))
        assert total == pytest.approx(1)


@given(train=token_lists, held_out=st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=2, max_size=30))
def test_loss_is_the_mean_over_the_pairs_of_held_out(train: list[int], held_out: list[int]) -> None:
    for loss in (unigram_loss, bigram_loss):
        pairs = [loss(ids(*train), ids(*held_out[i : i + 2]), VOCAB_SIZE) for i in range(len(held_out) - 1)]
        assert loss(ids(*train), ids(*held_out), VOCAB_SIZE) == pytest.approx(sum(pairs) / len(pairs))


def test_pair_codes_of_a_large_vocabulary_do_not_overflow() -> None:
    # 150000 squared is past int32, where wrapped codes would confuse pairs.
    train = np.tile(ids(149_999, 149_998), 50)
    assert bigram_loss(train, train, vocab_size=150_000) < 0.1
    assert bigram_loss(train, ids(149_999, 149_999), vocab_size=150_000) > 5


def test_bigram_learns_order_that_the_unigram_cannot() -> None:
    text = np.tile(np.arange(8, dtype=np.int32), 40)
    assert unigram_loss(text, text, 8) == pytest.approx(math.log(8))
    assert bigram_loss(text, text, 8) < 0.05


@pytest.mark.parametrize("loss", [unigram_loss, bigram_loss])
@pytest.mark.parametrize(("train", "held_out"), [([0, 4], [0, 1]), ([0, 1], [4, 1]), ([0, -1], [0, 1])])
def test_id_outside_the_vocabulary_is_refused(loss: Loss, train: list[int], held_out: list[int]) -> None:
    with pytest.raises(
        ValueError, match=r"ids run from (-1|0) to (4|1), they must be in \[0, 4\): pass the vocab_size"
    ):
        loss(ids(*train), ids(*held_out), 4)


@pytest.mark.parametrize("loss", [unigram_loss, bigram_loss])
@pytest.mark.parametrize(("train", "held_out"), [([], [0, 1]), ([0, 1], [0])])
def test_too_few_tokens_are_refused(loss: Loss, train: list[int], held_out: list[int]) -> None:
    with pytest.raises(ValueError, match=rf"{len(train)} train and {len(held_out)} held-out tokens.*give more text"):
        loss(ids(*train), ids(*held_out), 4)
