"""Word boundaries from outside for the training of a tokenizer, such as a morphological analyser's."""

from __future__ import annotations

import importlib
import queue
import re
import shlex
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate

from megatron_cpt.errors import TokenizerError

# Of a plane for private use: SentencePiece cuts a training text here and removes it.
BOUNDARY = "\U000f0000"
_CALLABLE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")

Presegmenter = Callable[[Iterable[str]], Iterator[str]]


def load_presegmenter(name: str) -> Presegmenter:
    """A function that marks the word boundaries in lines of text, by its name.

    Whoever finds the words gives a line back with white space between them, as `mecab -Owakati` does.
    Only the boundaries are taken from it: the line itself stays what it was, spaces included.

    Args:
        name: "module:function", a Python function from a line to its words with spaces between them; or
            a command that reads lines from its standard input and writes one line for each.

    Returns:
        A function from lines to the same lines with `BOUNDARY` between the words.

    Raises:
        TokenizerError: at once, when there is no such function; later, from the lines, when what comes back
            is not the line's own characters, or the command fails.

    Source: Fujii et al. 2024 (arXiv 2404.17790), MeCab before the training of the Japanese vocabulary.
    """
    if not _CALLABLE.fullmatch(name):
        command = shlex.split(name)
        if not command:
            raise TokenizerError("the presegmenter is empty: expected module:function or a command, as mecab -Owakati")
        return lambda lines: _through_command(command, lines)
    module, _, function = name.partition(":")
    try:
        segment = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as caught:
        raise TokenizerError(f"there is no presegmenter {name!r} ({caught}): expected module:function") from None
    return lambda lines: (_marked(line, segment(line), name) for line in lines)


def _marked(line: str, segmented: str, name: str) -> str:
    words = segmented.split()
    if "".join(words) != "".join(line.split()):
        raise TokenizerError(
            f"the presegmenter {name!r} gave {segmented[:60]!r} for {line[:60]!r}: expected the same characters with "
            "spaces between the words"
        )
    ends = set(accumulate(map(len, words)))
    marked: list[str] = []
    passed = 0  # characters that are no space
    for character in line:
        if not character.isspace():
            if passed in ends and not marked[-1].isspace():
                marked.append(BOUNDARY)
            passed += 1
        marked.append(character)
    return "".join(marked)


def _through_command(command: list[str], lines: Iterable[str]) -> Iterator[str]:
    """The lines with the boundaries that a command finds, which runs once for all of them."""
    name = shlex.join(command)
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    except OSError as caught:
        raise TokenizerError(f"the presegmenter {name!r} cannot be started: {caught.strerror or caught}") from None
    assert process.stdin is not None and process.stdout is not None
    given: queue.SimpleQueue[str] = queue.SimpleQueue()
    feeder = _Feeder(process.stdin, lines, given)
    feeder.start()
    try:
        for answer in process.stdout:
            if given.empty():
                raise TokenizerError(f"the presegmenter {name!r} writes more lines than it reads: expected one for one")
            yield _marked(given.get(), answer.decode(errors="replace"), name)
        code = process.wait()
        feeder.join()
        if feeder.failure is not None:
            raise feeder.failure
        if code or not given.empty():
            raise TokenizerError(
                f"the presegmenter {name!r} ended with code {code} and left {given.qsize()} lines without an answer: "
                "expected one line for each, and code 0"
            )
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        feeder.join()


class _Feeder(threading.Thread):
    """Writes lines to a process while its answers are read, so that neither waits for the other."""

    def __init__(self, stream: object, lines: Iterable[str], given: queue.SimpleQueue[str]) -> None:
        super().__init__(daemon=True)
        self._stream, self._lines, self._given = stream, lines, given
        self.failure: Exception | None = None

    def run(self) -> None:
        """Write all lines, then close; what goes wrong in the lines themselves is kept for the reader."""
        try:
            with self._stream as stream:  # type: ignore[attr-defined]
                for line in self._lines:
                    data = line.encode() + b"\n"
                    self._given.put(line)
                    stream.write(data)
        except BrokenPipeError:
            pass  # the process has ended; its reader says so
        except Exception as caught:
            self.failure = caught
