"""Text becomes sequences, and every sequence is dealt once an epoch, at any world size."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from torch_impl.errors import DataError
from torch_impl.training.data import IGNORED, Dealer, collate, held_out, read_documents, refuse_beyond, sequences


class Bytewise:
    """A tokenizer of one token a character."""

    eos_token_id = 0

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        """Characters' code points."""
        return {"input_ids": [ord(c) for c in text]}


def dealer(rank: int, world: int, batch_size: int, accumulate: int = 1) -> Dealer:
    """Twelve sequences, told apart by their first token."""
    return Dealer([[i + 1, 5, 6] for i in range(12)], 3, world, rank, batch_size, accumulate)


def dealt(world: int, batch_size: int, accumulate: int, steps: int) -> list[Counter[int]]:
    """Which sequences each step gets, over all ranks."""
    found = []
    for step in range(steps):
        ranks = [dealer(rank, world, batch_size, accumulate) for rank in range(world)]
        batches = [b for one in ranks for b in one.step(step * one.sequences_per_step)]
        found.append(Counter(token for b in batches for token in b.tokens_SL[:, 0].tolist()))
    return found


def test_t6_a_step_holds_the_same_sequences_at_any_world_size() -> None:
    """Six sequences a step: as 1 x 6, 2 x 3, 3 x 2 or 1 x 2 x 3 they are the same."""
    assert dealt(1, 6, 1, 4) == dealt(2, 3, 1, 4) == dealt(3, 2, 1, 4) == dealt(1, 2, 3, 4)


def test_every_sequence_is_dealt_once_an_epoch() -> None:
    """Two steps of six are an epoch of twelve; the next epoch has another order."""
    steps = dealt(2, 3, 1, 4)

    assert steps[0] + steps[1] == steps[2] + steps[3] == Counter(range(1, 13))
    assert steps[0] != steps[2]


def test_packing_cuts_the_stream_every_seq_len_tokens() -> None:
    """Documents are joined by the end-of-text token; the last piece is short."""
    assert sequences(["abc", "de"], Bytewise(), seq_len=3, packing=True) == [[97, 98, 99], [0, 100, 101]]
    assert sequences(["abc", "de"], Bytewise(), seq_len=3, packing=False) == [[97, 98, 99], [100, 101, 0]]


def test_labels_are_the_next_tokens_and_nothing_beyond_them() -> None:
    """Padding and the last position predict nothing, so a batch counts what it predicts."""
    batch = collate([[1, 2, 3], [4, 5]])

    assert batch.labels_SL.tolist() == [[2, 3, IGNORED], [5, IGNORED, IGNORED]]
    assert batch.count == 3


def test_held_out_sequences_are_not_trained_on() -> None:
    """The two parts make up the whole, and depend on the seed alone."""
    items = [[i, i] for i in range(20)]
    train, evaluation = held_out(items, fraction=0.25, seed=1)

    assert sorted(train + evaluation) == items
    assert len(evaluation) == 5
    assert held_out(items, fraction=0.25, seed=1) == (train, evaluation)


def test_both_kinds_of_file_are_read(tmp_path: Path) -> None:
    """Blank lines part .txt; .jsonl has a text a line."""
    (tmp_path / "a.txt").write_text("one\nline\n\n\n\ntwo\n")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in ("one\nline", "two")) + "\n")

    assert read_documents(tmp_path / "a.txt") == read_documents(tmp_path / "a.jsonl") == ["one\nline", "two"]


def test_a_json_string_may_hold_what_unicode_calls_a_line_end(tmp_path: Path) -> None:
    """A line separator inside a string doesn't end the line."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "one\u2028\x85two"}, ensure_ascii=False), encoding="utf-8")

    assert read_documents(tmp_path / "a.jsonl") == ["one\u2028\x85two"]


@pytest.mark.parametrize(
    ("items", "words"), [([[1] * 9], "has 9 tokens, the model 8 pos"), ([[1, 5]], "gives token 5")]
)
def test_what_the_model_has_no_place_for_is_refused(items: list[list[int]], words: str) -> None:
    """Too long a sequence, or a token of another vocabulary."""
    model = nn.Module()
    model.config = SimpleNamespace(max_position_embeddings=8)
    model.get_input_embeddings = lambda: nn.Embedding(5, 2)

    with pytest.raises(DataError, match=words):
        refuse_beyond(model, items)


BAD = {
    "a.csv": (b"a,b", "neither .txt nor .jsonl"),
    "b.jsonl": (b'{"text": "x"}\n{"txt": "y"}\n', 'line 2 has no string "text"'),
    "c.jsonl": (b"{", "line 1 is no JSON"),
    "d.txt": (b"\xff\xfe", "can't be read"),
    "e.txt": (b"\n\n", "e.txt holds no text"),
    "f.jsonl": (b'{"text": "\\ud800"}', "line 1 is no text"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_text_is_refused_with_its_line(tmp_path: Path, name: str) -> None:
    """One line with the file, the place and the mend."""
    content, words = BAD[name]
    (tmp_path / name).write_bytes(content)

    with pytest.raises(DataError, match=words):
        read_documents(tmp_path / name)


def test_no_sequence_of_two_tokens_is_refused() -> None:
    """Text of nothing to predict can't be trained on."""
    with pytest.raises(DataError, match="no sequence of two tokens"):
        sequences([], Bytewise(), seq_len=8, packing=True)
