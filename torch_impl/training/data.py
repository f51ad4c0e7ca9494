"""Training text: read it, cut it into sequences, deal the sequences to ranks and steps.

Axes: S sequences of one batch, L positions.
Clauses: S3 (ranks may hold unequal token counts), T6 (the order depends on seed and position alone).

A `.jsonl` file holds an object with `text` a line; in a `.txt` file blank lines part the documents. Packed, documents
are joined by the end-of-text token and cut every `seq_len` tokens (the last piece is short); otherwise a document is a
sequence, cut off at `seq_len`. Every epoch is a permutation by seed and epoch; *position* counts sequences since the
start over all epochs, so it is all that a checkpoint needs, at any world size.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_impl.errors import DataError

IGNORED = -100
"""The label that cross entropy leaves out."""


@dataclass(frozen=True)
class Batch:
    """What one rank runs at once."""

    tokens_SL: Tensor  # noqa: N815 - the suffix says the axes
    labels_SL: Tensor  # noqa: N815 - likewise
    """Position l holds the token at l + 1; `IGNORED` where there is none."""

    @property
    def count(self) -> int:
        """Tokens that are predicted."""
        return int((self.labels_SL != IGNORED).sum())


def read_documents(path: Path) -> list[str]:
    """The documents of a .txt or .jsonl file, in order.

    Raises:
        DataError: the file is missing, of another kind, not UTF-8, without text, or a line isn't an object with a
            string `text`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(f"--data {path} can't be read: {problem}", hint="give a UTF-8 .txt or .jsonl file") from None
    if path.suffix == ".txt":
        found = [part.strip() for part in text.split("\n\n") if part.strip()]
    elif path.suffix == ".jsonl":  # not splitlines, which ends lines at what a JSON string may hold
        found = [_text_of(path, number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    else:
        raise DataError(f"--data {path} is neither .txt nor .jsonl", hint="name it by what it holds")
    if not found:
        raise DataError(f"--data {path} holds no text", hint="give more text")
    return found


def _text_of(path: Path, number: int, line: str) -> str:
    """One line's text."""
    try:
        found = json.loads(line)
    except ValueError as problem:
        raise DataError(f"{path} line {number} is no JSON: {problem}", hint="write one object a line") from None
    if not isinstance(found, dict) or not isinstance(found.get("text"), str):
        raise DataError(f'{path} line {number} has no string "text"', hint='write {"text": "..."} on each line')
    try:
        found["text"].encode()
    except UnicodeEncodeError as problem:
        raise DataError(f"{path} line {number} is no text: {problem}", hint="write whole characters") from None
    return found["text"]


def sequences(documents: Sequence[str], tokenizer: Any, *, seq_len: int, packing: bool) -> list[list[int]]:
    """Token sequences of at most `seq_len`, each of at least two tokens.

    Raises:
        DataError: no sequence of two tokens comes out.
    """
    ending = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + ending for text in documents]
    if packing:
        stream = [token for document in encoded for token in document]
        encoded = [stream[start : start + seq_len] for start in range(0, len(stream), seq_len)]
    cut = [document[:seq_len] for document in encoded]
    kept = [sequence for sequence in cut if len(sequence) > 1]
    if not kept:
        raise DataError(f"{len(documents)} documents give no sequence of two tokens", hint="give more text")
    return kept


def refuse_beyond(model: Any, items: list[list[int]]) -> None:
    """What the model, or its skeleton on meta, has no position or no embedding for.

    Raises:
        DataError: a sequence longer than the model's positions, or a token beyond its vocabulary.
    """
    longest, highest = max(map(len, items)), max(map(max, items))
    positions = getattr(model.config, "max_position_embeddings", None) or longest
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if longest > positions:
        raise DataError(f"a sequence has {longest} tokens, the model {positions} positions", hint="lower --seq-len")
    if highest >= vocabulary:
        raise DataError(
            f"the tokenizer gives token {highest}, the model knows {vocabulary}", hint="use the model's own tokenizer"
        )


def held_out(items: list[list[int]], *, fraction: float, seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """Training and evaluation sequences, by seed; no evaluation where the fraction is 0.

    Raises:
        DataError: one part would be empty.
    """
    count = round(fraction * len(items))
    if fraction and not 0 < count < len(items):
        raise DataError(f"--eval-fraction {fraction} of {len(items)} sequences leaves one part empty", hint="change it")
    order = _order(len(items), seed=seed, epoch=-1)
    return [items[i] for i in sorted(order[count:])], [items[i] for i in sorted(order[:count])]


@dataclass(frozen=True)
class Dealer:
    """Which sequences a rank runs at which step."""

    items: Sequence[list[int]]
    seed: int
    world_size: int
    rank: int
    batch_size: int
    """Sequences of one rank in one forward."""
    accumulate: int
    """Forwards of one step."""

    @property
    def sequences_per_step(self) -> int:
        """Over all ranks."""
        return self.world_size * self.batch_size * self.accumulate

    def step(self, position: int) -> list[Batch]:
        """This rank's batches of the step that begins at `position`: each batch is dealt to all ranks in turn."""
        picked = self._from(position)
        parts = [[next(picked) for _ in range(self.batch_size)] for _ in range(self.world_size * self.accumulate)]
        return [collate(parts[micro * self.world_size + self.rank]) for micro in range(self.accumulate)]

    def _from(self, position: int) -> Iterator[list[int]]:
        """The endless stream of sequences, from a position on."""
        size = len(self.items)
        epoch, offset = divmod(position, size)
        while True:
            for index in _order(size, seed=self.seed, epoch=epoch)[offset:]:
                yield self.items[index]
            epoch, offset = epoch + 1, 0


def _order(size: int, *, seed: int, epoch: int) -> list[int]:
    """A permutation that depends on nothing but its arguments."""
    order = list(range(size))
    random.Random(f"{seed}/{epoch}").shuffle(order)  # noqa: S311 - an order, not a secret
    return order


def collate(items: Sequence[Sequence[int]]) -> Batch:
    """Right-padded to the longest: under causal attention no token sees a padded position, so no mask is needed."""
    length = max(len(item) for item in items)
    tokens_SL = torch.zeros(len(items), length, dtype=torch.long)
    labels_SL = torch.full((len(items), length), IGNORED, dtype=torch.long)
    for row, item in enumerate(items):
        tokens_SL[row, : len(item)] = torch.tensor(item)
        labels_SL[row, : len(item) - 1] = torch.tensor(item[1:])
    return Batch(tokens_SL, labels_SL)
