from typing import Any

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]

# The order of the data (csrc/bind_order.cpp)

def derive(key: int, number: int) -> int: ...
def visit(index: int, size: int, key: int) -> int: ...

class StageOrder:
    def __init__(self, lanes: Int64s, unit: int, samples: int, block: int) -> None: ...
    def at(self, sample: int) -> tuple[int, int]: ...
    def counts(self, samples: int) -> Int64s: ...

def gather(
    stream: npt.NDArray[np.integer], starts: Int64s, first: int, length: int, vocab_size: int
) -> tuple[Int64s, Int64s]: ...

# Samples and packing (csrc/bind_packing.cpp)

def sample(
    stream: npt.NDArray[np.integer],
    document_starts: Int64s,
    firsts: Int64s,
    counts: npt.NDArray[np.int32],
    seq_length: int,
    vocab_size: int,
) -> tuple[Int64s, Int64s, Int64s]: ...
def sample_index(
    lengths: npt.NDArray[np.int32], order: npt.NDArray[np.int32], seq_length: int, num_samples: int
) -> npt.NDArray[np.signedinteger]: ...
def pack(document_starts: Int64s, seq_length: int) -> tuple[Int64s, npt.NDArray[np.int32], Int64s]: ...

# Blocks of documents (csrc/bind_records.cpp)

Buffer = bytes | bytearray | memoryview
Bools = npt.NDArray[np.bool_]
Column = tuple[Int64s, Any, Bools | None]  # offsets, data, which rows hold a value

class Block:
    """Documents back to back, and the records that were left out."""

    @staticmethod
    def from_texts(texts: list[str]) -> Block: ...
    @staticmethod
    def of_fault(line: int, reason: str) -> Block: ...
    def __len__(self) -> int: ...
    @property
    def text_bytes(self) -> int: ...
    @property
    def document_bytes(self) -> Int64s:
        """Bytes of each document's text in UTF-8."""
    @property
    def lines(self) -> Int64s:
        """Line (row) from 1 at which each document begins."""
    @property
    def faults(self) -> list[tuple[int, str]]:
        """(line, reason) of each record that was left out, in order."""
    def texts(self) -> list[str]: ...
    def ids(self) -> list[str]:
        """The id of each document; empty where the corpus gives none."""
    def select(self, keep: Bools) -> Block:
        """The documents of a mask, and all faults."""
    def held_out(self, fraction: float) -> Bools:
        """`documents.is_held_out` of each document."""
    def write_jsonl(self, keep: Bools, texts: list[str | None] | None = None) -> bytes:
        """One JSON line a document of the mask: its own line, with the text replaced where `texts` has another.

        Documents that do not come from jsonl give {"id", "text"}; a block of jsonl must be parsed with
        `keep_records=True`.
        """

class Sha256:
    """SHA-256 whose state can be saved and taken up again."""

    def __init__(self, instructions: bool = True) -> None:
        """With the processor's own instructions where it has them, or the portable way."""
    def update(self, data: Buffer) -> None: ...
    def digest(self) -> bytes: ...
    def saved(self) -> bytes: ...
    @staticmethod
    def from_saved(saved: bytes) -> Sha256: ...

def parse_jsonl(
    data: Buffer, text_field: str, first_line: int, longest: int = ..., keep_records: bool = False
) -> Block: ...
def parse_txt(data: Buffer, first_line: int, longest: int = ...) -> Block: ...
def parse_columns(
    texts: Column, names: Column | None, text_field: str, first_row: int, longest: int = ...
) -> Block: ...
def count_lines(data: Buffer) -> int: ...
def last_border(data: Buffer, paragraphs: bool) -> int: ...
def first_border(data: Buffer, paragraphs: bool) -> int: ...
def unfinished(data: Buffer, paragraphs: bool) -> bytes: ...

# Signatures of documents and duplicates among them (csrc/bind_minhash.cpp)

UInt32s = npt.NDArray[np.uint32]
UInt64s = npt.NDArray[np.uint64]

def minhash(block: Block, num_permutations: int = 128, shingle: int = 5, seed: int = 0) -> UInt32s: ...
def fingerprints(block: Block) -> UInt64s: ...
def sort_band(words: UInt32s, chosen: npt.NDArray[np.bool_], begin: int, end: int) -> tuple[UInt64s, UInt32s]: ...
def join_band(
    keys: UInt64s, documents: Int64s, parts: list[UInt32s], firsts: list[int], begin: int, end: int, needed: int
) -> Int64s: ...

class Components:
    def __init__(self, count: int) -> None: ...
    def unite(self, pairs: Int64s) -> None: ...
    def roots(self) -> Int64s: ...

# Figures of texts for the rules of cleaning (csrc/bind_text.cpp)

def text_metrics(
    block: Block, stop_words: list[str] = ..., wanted: list[str] = ...
) -> dict[str, npt.NDArray[np.float64]]:
    """Figures of each document: the wanted ones, or all of `metric_names()`."""

def metric_names() -> list[str]: ...

# Texts to ids (csrc/bind_encoder.cpp)

class BpeEncoder:
    def __init__(self, model: bytes) -> None:
        """Of the bytes of a model file. Raises ValueError where they are damaged, or no BPE model."""
    def encode(
        self, block: Block, before: int, after: int, wide: bool
    ) -> tuple[npt.NDArray[np.uint16] | npt.NDArray[np.int32], npt.NDArray[np.int32], int, int]: ...
