"""Fill in the middle: the parts make up the original, to the byte; the window's length is exact; rates; refusals."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapar.data.corpus import Corpus
from megapar.data.tokenizer import END_OF_TEXT, ByteTokenizer, CharacterTokenizer, Tokenizer, load_tokenizer
from megapar.objectives.causal_lm import CausalLM
from megapar.objectives.fim import BROKEN, FillInTheMiddle
from megapar.objectives.randomness import Generator
from megapar.objectives.sample import IGNORED, Ids
from tests.objectives.common import COMMON, END, FIM_IDS, MID, PRE, RESET, SUF, VOCAB, joined, seeds, text, thousand, whole

ALPHABET = "ab \nżł漢😀�e\u0301"
texts = st.text(ALPHABET, max_size=30)
rates = st.sampled_from([0.0, 0.5, 1.0])
END_OF_TEXT_ID = 0
TRAINING = ("ab aż 漢漢ł ", "😀 e\u0301ba ab\n")


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    tokenizer = load_tokenizer("bpe", Corpus("test", TRAINING * 50, "0" * 64), 300, tmp_path_factory.mktemp("cache"))
    assert tokenizer.end_of_text == END_OF_TEXT_ID
    return tokenizer



def fim(length: int = 24, tokenizer: Tokenizer | None = None, **settings: object) -> FillInTheMiddle:
    """Sentinels above the vocabulary: of the tokenizer, or of `text` at token level."""
    if tokenizer is None:
        return FillInTheMiddle(**{**COMMON, "sequence_length": length, **FIM_IDS, "level": "token", **settings})
    v = tokenizer.vocab_size
    ids = {"prefix_id": v, "suffix_id": v + 1, "middle_id": v + 2, "end_id": tokenizer.end_of_text}
    return FillInTheMiddle(**{"sequence_length": length, "vocab_size": v, **ids, "tokenizer": tokenizer, **settings})


def reordered(objective: FillInTheMiddle, ids: list[int]) -> tuple[list[list[int]], str]:
    """([prefix, middle, suffix] or [text], order) of a document without its end token, from the sentinels alone."""
    marks = [objective.prefix_id, objective.suffix_id, objective.middle_id]
    if not set(ids) & set(marks):
        return [ids], "plain"
    assert [token for token in ids if token in marks] == marks, "one of each, in this order"
    first, second = ids.index(marks[1]), ids.index(marks[2])
    assert ids[0] == marks[0]
    prefix, suffix, middle = ids[1:first], ids[first + 1 : second], ids[second + 1 :]
    return [prefix, middle, suffix], "psm or empty spm" if first > 1 else "spm or empty psm"


def documents_in(objective: FillInTheMiddle, ids: list[int]) -> list[list[int]]:
    """The documents, each with its end token; the last one may lack it."""
    return [part.tolist() for part in np.split(np.array(ids), np.flatnonzero(np.array(ids) == objective.end_id) + 1) if len(part)]


@thousand
@given(st.integers(0, 30), rates, rates, seeds)
def test_documents_come_back_between_tokens(n, rate, spm_rate, seed):
    objective, tokens = fim(rate=rate, spm_rate=spm_rate), text(n, seed)
    ids = objective.document(tokens, Generator(seed)).tolist()
    assert ids[-1] == END and len(ids) in (n + 1, n + 4)
    parts, order = reordered(objective, ids[:-1])
    assert joined(parts) == tokens.tolist()
    assert (order == "plain") if rate == 0 or n == 0 else (rate < 1 or order != "plain")
    if order != "plain" and spm_rate == 1:
        assert parts[0] == [], "the prefix is given with the middle"


@thousand
@given(document=texts, spm_rate=rates, seed=seeds, kind=st.sampled_from(["bytes", "characters", "bpe"]))
def test_documents_come_back_between_characters(bpe, document, spm_rate, seed, kind):
    tokenizer = {"bytes": ByteTokenizer(), "characters": CharacterTokenizer(ALPHABET), "bpe": bpe}[kind]
    objective = fim(64, tokenizer, rate=1.0, spm_rate=spm_rate)
    ids = objective.document(np.array(tokenizer.encode(document), np.int64), Generator(seed)).tolist()
    parts, order = reordered(objective, ids[:-1])
    assert (order == "plain") == (not document)
    assert tokenizer.decode(joined(parts)).encode() == document.encode()
    if BROKEN not in document:  # which can't be told from broken bytes: cut between tokens, it may lie in two parts
        assert "".join(map(tokenizer.decode, parts)) == document


@thousand
@given(raw=st.binary(max_size=12), seed=seeds)
def test_broken_bytes_do_not_change(raw, seed):
    """A byte tokenizer's ids are the bytes, so nothing is hidden by decoding."""
    objective = fim(64, ByteTokenizer(), rate=1.0)
    parts, _ = reordered(objective, objective.document(np.frombuffer(raw, np.uint8).astype(np.int64), Generator(seed)).tolist()[:-1])
    assert bytes(joined(parts)) == raw


@pytest.mark.parametrize("document", ["漢字かな", "😀😀 ab"])
def test_a_window_that_cuts_characters_is_cut_between_the_others(document):
    raw = document.encode()[1:-1]
    objective = fim(64, ByteTokenizer(), rate=1.0, spm_rate=0.0)
    seen = set()
    for seed in range(200):
        ids = objective.document(np.frombuffer(raw, np.uint8).astype(np.int64), Generator(seed)).tolist()[:-1]
        prefix, middle, suffix = reordered(objective, ids)[0]
        bytes(middle).decode()  # whole characters
        seen.add(len(middle))
        assert bytes(prefix + middle + suffix) == raw
    assert len(seen) > 2


@thousand
@given(st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=25), rates, rates, seeds)
def test_windows(tokens, rate, spm_rate, seed):
    """Exact length; every document but the last is whole; the last is one whose text ended earlier."""
    objective = fim(rate=rate, spm_rate=spm_rate)
    window = np.array(tokens, np.int64)
    ids = objective.window(window, Generator(seed)).tolist()
    assert len(ids) == len(tokens)
    if rate == 0:
        assert ids == tokens
    originals, found = documents_in(objective, tokens), documents_in(objective, ids)
    room = len(tokens)
    assert len(found) <= len(originals)
    for number, (document, original) in enumerate(zip(found, originals, strict=False)):
        parts, order = reordered(objective, [token for token in document if token != END])
        content = [token for token in original if token != END]
        if number < len(found) - 1:
            assert document[-1] == END and joined(parts) == content
            assert rate < 1 or not content or order != "plain" or len(original) + 3 > room, "plain only where it does not fit"
        else:
            assert joined(parts) == content[: len(joined(parts))], "cut at its end only"
            assert order == "plain" or document[-1] == END, "a middle is followed by the end token"
        room -= len(document)


@thousand
@given(document=texts, length=st.integers(2, 40), seed=seeds)
def test_windows_of_characters(bpe, document, length, seed):
    """Windows of a tokenized text, which cut characters and merges anywhere: never too long, and text of the window as far as they go."""
    tokens = np.array([*bpe.encode(document), END_OF_TEXT_ID, *bpe.encode(document[::-1]), 5, 6], np.int64)[:length]
    objective = fim(40, bpe, rate=1.0, end_id=END_OF_TEXT_ID)
    if len(tokens) < 2:
        return
    ids = objective.window(tokens, Generator(seed)).tolist()
    assert len(ids) <= len(tokens)
    for found, original in zip(documents_in(objective, ids), documents_in(objective, tokens.tolist()), strict=False):
        parts, _ = reordered(objective, [token for token in found if token != END_OF_TEXT_ID])
        # Cut off anywhere, the last document's end may be a piece of a character.
        assert bpe.decode(original).removesuffix(END_OF_TEXT).startswith(bpe.decode(joined(parts)).rstrip(BROKEN))


def test_a_cut_takes_the_suffix_and_leaves_the_middle():
    tokens = text(25, 1)
    objective = fim(rate=1.0)
    for seed in range(300):
        (prefix, middle, suffix), _ = parts = reordered(objective, objective.document(tokens, Generator(seed, 0)).tolist()[:-1])
        ids = objective.window(tokens, Generator(seed)).tolist()
        if len(suffix) >= 4:
            cut, order = reordered(objective, ids[:-1])
            assert ids[-1] == END and order == parts[1]
            assert cut == [prefix, middle, suffix[:-4]], "three sentinels and an end token"
        else:
            assert ids == tokens.tolist(), "no room: left as it was"


def test_neighbours_do_not_matter():
    """The second document of a window is transformed alike whatever the first holds."""
    objective = fim(rate=0.5)
    for seed in range(200):
        second = [*text(6, seed).tolist(), END]
        windows = [objective.window(np.array([*first, END, *second, 3, 4, 5, 6, 7, 8]), Generator(seed)) for first in ([1], [2, 3])]
        assert documents_in(objective, windows[0].tolist())[1] == documents_in(objective, windows[1].tolist())[1]


def test_rates_and_cuts():
    objective = fim(400, rate=0.5, spm_rate=0.3)
    count, tokens = 4000, text(9)
    orders, places = [], np.zeros(10)
    for i in range(count):
        ids = objective.document(tokens, Generator(1, i)).tolist()
        orders.append("plain" if PRE not in ids else "spm" if ids[1] == SUF else "psm")
        if orders[-1] == "psm":
            places[len(ids) - 2 - ids.index(MID)] += 1
    # A PSM document of an empty prefix looks like SPM's: cuts are two of 10 places, the first is 0 with probability 1 - 0.9^2.
    empty = 1 - 0.9**2
    for name, rate in (("plain", 0.5), ("psm", 0.5 * 0.7 * (1 - empty)), ("spm", 0.5 * (0.3 + 0.7 * empty))):
        assert abs(orders.count(name) - count * rate) < 5 * (count * rate * (1 - rate)) ** 0.5, name
    middle = np.array([sum(1 for a in range(1, 10) for b in range(1, 10) if abs(a - b) == m) for m in range(10)]) / 81
    expected = places.sum() * middle[:9]
    assert ((places[:9] - expected) ** 2 / expected).sum() < 8 + 5 * 16**0.5, "two uniform places, sorted"


def test_loss_is_on_all_of_it():
    sample = fim(rate=1.0)(text(25), Generator(3))
    assert (sample.targets != IGNORED).all() and {SUF, MID, END} <= set(whole(sample))


@thousand
@given(st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=25), seeds, st.booleans())
def test_rate_0_is_plain_causal_lm(tokens, seed, reset):
    options = {"end_id": END, **(RESET if reset else {})}
    plain = CausalLM(**COMMON, **options)(np.array(tokens), Generator(seed))
    sample = fim(rate=0.0, **options)(np.array(tokens), Generator(seed))
    for field in dataclasses.fields(sample):
        a, b = getattr(sample, field.name), getattr(plain, field.name)
        assert field.name == "objective" or np.array_equal(a, b)


class Lossy(ByteTokenizer):
    """Drops leading spaces, as SentencePiece's decoder does."""

    def decode(self, ids) -> str:
        return super().decode(ids).lstrip(" ")


@pytest.mark.parametrize(
    "settings,told",
    [
        ({"rate": 1.5}, "rate=1.5 must be between 0 and 1"),
        ({"spm_rate": float("nan")}, "spm_rate=nan must be between"),
        ({"end_id": None}, "end_id is none"),
        ({"suffix_id": PRE}, "must be different and 0 or more"),
        ({"middle_id": -1}, "must be different and 0 or more"),
        ({"level": "character"}, "level=character cuts text and there is no tokenizer"),
    ],
)
def test_refusals(settings, told):
    with pytest.raises(ValueError, match=told):
        fim(**settings)


def ids_of(*ids: int) -> Ids:
    return np.array(ids, np.int64)


def test_bad_text_is_refused():
    with pytest.raises(ValueError, match="the document holds end_id=0, which is put after it"):
        fim().document(ids_of(1, END, 2), Generator(0))
    with pytest.raises(ValueError, match="the text holds one of the sentinels"):
        fim(vocab_size=40)(ids_of(1, MID, 2), Generator(0))
    objective = fim(64, Lossy(), rate=1.0)
    with pytest.raises(ValueError, match="the tokenizer does not give back text that it encoded in parts"):
        for seed in range(50):
            objective.document(np.array(list(b"a b c d")), Generator(seed))
