"""The samples that one dataset holds: spans of its stream, or pieces of documents packed into bins.

A prediction is a token and the token after it in the same document. A window is S positions of
predictions; a pass over all windows makes every prediction of the dataset exactly once. Only the first
token of a document is never predicted: nothing before it speaks of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from megatron_cpt.config.manifest import sha256_json
from megatron_cpt.data import _native
from megatron_cpt.data.indexed import IndexedDataset, bin_path
from megatron_cpt.data.packing import open_pack
from megatron_cpt.errors import DataError

Int64s = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]
Packing = Literal["concat", "best_fit"]

IGNORED = -100  # label of a position that is not scored


@dataclass(frozen=True)
class Window:
    """S positions of a dataset.

    Args:
        tokens_S: int64 input ids; 0 where padded.
        labels_S: int64 next ids; -100 where the next token begins a document or is padding.
        starts: int64 increasing positions from 0 on at which a document, a piece of one or the padding
            begins: attention and positions begin anew there.
    """

    tokens_S: Int64s
    labels_S: Int64s
    starts: Int64s


@dataclass(frozen=True)
class Sample:
    """A window, the number of its source in the plan, and the language of that source."""

    window: Window
    source: int
    language: str


class Windows:
    """The numbered windows of one dataset; make it with `open_windows`.

    Attributes:
        dataset: where the tokens are.
        seq_length: S, positions of a window.
        packing: how documents are laid into windows.
        laid_by: what besides the dataset decides that: the identity of its pack; empty for "concat".
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        seq_length: int,
        packing: Packing,
        count: int,
        pieces: Callable[[int], tuple[Int64s, Int32s]],
        laid_by: Sequence[int | str] = (),
    ) -> None:
        self.dataset, self.seq_length, self.packing, self.laid_by = dataset, seq_length, packing, laid_by
        self._count, self._pieces = count, pieces
        # The pieces of a packed window hold no border of documents inside: there is nothing to look for.
        self._borders = dataset.document_starts if packing == "concat" else np.zeros(0, np.int64)

    def __len__(self) -> int:
        """Windows of one pass."""
        return self._count

    @property
    def content_hash(self) -> str:
        """SHA-256 that stands for all windows: with an equal one, `window(k)` is the same for every k."""
        outputs = self.dataset.manifest.get("outputs", {})
        files = [outputs[ending]["sha256"] for ending in ("bin", "idx") if ending in outputs]
        return sha256_json([self.packing, self.seq_length, files or self.dataset.content_hash, *self.laid_by])

    def pieces(self, number: int) -> tuple[Int64s, Int32s]:
        """Where window `number` comes from: the first token in the stream of each piece, and its predictions.

        A piece of n predictions reads n + 1 tokens of the stream; those of `concat` cross documents.

        Raises:
            DataError: there is no such window.
        """
        if not 0 <= number < self._count:
            raise DataError(f"{self.dataset.prefix} has no window {number}; expected 0 to {self._count - 1}")
        return self._pieces(number)

    def window(self, number: int) -> Window:
        """Window `number`, from 0; what is left of the last ones is padded.

        Raises:
            DataError: there is no such window, or the dataset holds an id that is not of its vocabulary.
        """
        return self._window(*self.pieces(number))

    def padding(self) -> Window:
        """A window of padding alone, to fill up a batch of which nothing more is to be scored."""
        return self._window(np.zeros(0, np.int64), np.zeros(0, np.int32))

    def _window(self, firsts: Int64s, counts: Int32s) -> Window:
        dataset = self.dataset
        try:
            return Window(
                *_native.sample(dataset.stream, self._borders, firsts, counts, self.seq_length, dataset.vocab_size)
            )
        except ValueError as caught:
            raise DataError(
                f"{bin_path(dataset.prefix)}: {caught}, expected 0 to {dataset.vocab_size - 1}; build the dataset again"
            ) from None
        except IndexError as caught:
            raise DataError(f"{dataset.prefix}: {caught}; the pack is damaged, make it again") from None


def open_windows(dataset: IndexedDataset, seq_length: int, packing: Packing = "concat") -> Windows:
    """The windows of a dataset.

    Args:
        dataset: the dataset.
        seq_length: S, positions of a window.
        packing: "concat": documents back to back, cut at multiples of S, so that they cross windows.
            "best_fit": whole documents (cut into pieces of S predictions and a rest where they are
            longer) in as few windows as best-fit decreasing finds; see `packing.pack_dataset`, which
            has to have been called before.

    Raises:
        DataError: another packing, seq_length below 1, fewer than two tokens, or no pack of this dataset.
    """
    if packing not in get_args(Packing):
        raise DataError(f"packing {packing!r}; expected one of {', '.join(get_args(Packing))}")
    if dataset.num_tokens < 2 or seq_length < 1:
        raise DataError(
            f"{dataset.prefix} with {dataset.num_tokens} tokens, seq_length {seq_length}: expected at least 2 and 1"
        )
    if packing == "best_fit":
        pack = open_pack(dataset, seq_length)
        return Windows(dataset, seq_length, packing, len(pack), pack.pieces, pack.identity)
    predictions = dataset.num_tokens - 1

    def span(number: int) -> tuple[Int64s, Int32s]:
        first = number * seq_length
        return np.array([first], np.int64), np.array([min(seq_length, predictions - first)], np.int32)

    return Windows(dataset, seq_length, packing, -(-predictions // seq_length), span)
