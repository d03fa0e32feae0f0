"""`megatron-cpt VERB ...`: finds the verb's module, runs it, and prints every error in one way.

Exit codes: 0 done, 1 failed, 2 wrong input (nothing was changed), 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import difflib
import importlib
import os
import shutil
import sys
from collections.abc import Sequence

from megatron_cpt import __version__
from megatron_cpt.errors import CptError, InputError, error_of_system

VERBS = {
    "run": "Walk the whole path of a recipe: base, tokenizer, surgery, data, training, export, report.",
    "plan": "Show what a configuration means: every value, parameters, layout, memory.",
    "tokenizer": "Train, extend, replace, measure and verify tokenizers.",
    "surgery": "Fit a model's embedding and head to another vocabulary.",
    "data": "Clean corpora; build, pack, inspect and verify indexed datasets.",
    "checkpoint": "Convert, verify and show checkpoints.",
    "train": "Train one job, starting its processes where nobody else did.",
    "evaluate": "Bits per byte of a model on held-out text.",
    "report": "Write a run's report again from its files.",
    "doctor": "Show the device, the versions, and which implementation each op would use.",
}
_NARROW = 70  # columns below which a table of options would cut their names
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def usage() -> str:
    """The text of `megatron-cpt --help`."""
    verbs = "\n".join(f"  {verb:<12}{text}" for verb, text in VERBS.items())
    return (
        "usage: megatron-cpt VERB ...\n\n"
        "Continue the pre-training of a Llama in another language, vocabulary included.\n\n"
        f"verbs:\n{verbs}\n\n"
        "options:\n"
        "  -h, --help  this text; `megatron-cpt VERB --help` for a verb\n"
        "  --version   the version of the package\n\n"
        "first steps:\n"
        "  megatron-cpt run quickstart\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: without the program's name; None takes those of the process.

    Raises:
        Exception: anything that is neither of the family of errors.py nor the system's refusal is a
            defect and keeps its traceback.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _answer(words)
        sys.stdout.flush()  # here, and not at the end of the process, where nothing can be said any more
        return code
    except CptError as caught:
        return _print_error(str(caught), caught.exit_code)
    except KeyboardInterrupt:
        return _print_error("stopped with Ctrl-C", INTERRUPTED)
    except BrokenPipeError:  # `megatron-cpt ... | head`: whoever reads has seen enough
        _drop_output()
        return 1
    except OSError as caught:
        error = error_of_system(caught)
        _drop_output()
        return _print_error(str(error), error.exit_code)


def _answer(words: list[str]) -> int:
    if not words or words[0] in ("--help", "-h"):
        print(usage(), end="")
        return 0 if words else InputError.exit_code
    if words[0] == "--version":
        print(f"megatron-cpt {__version__}")
        return 0
    return _run_verb(words[0], words[1:])


def _run_verb(verb: str, words: list[str]) -> int:
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(VERBS)}"
        raise InputError(f"unknown verb {verb!r}: {hint}")

    import typer

    app = importlib.import_module(f"megatron_cpt.cli.{verb}").app
    command = typer.main.get_command(app)
    # Shell completion is of a whole program; here each verb is a program of its own to typer.
    narrow = shutil.get_terminal_size().columns < _NARROW
    for part in (command, *getattr(command, "commands", {}).values()):
        part.context_settings["help_option_names"] = ["--help", "-h"]
        # Else the lines of a docstring stay lines on every terminal.
        part.help = "\n\n".join(" ".join(each.split()) for each in (part.help or "").split("\n\n"))
        if narrow:  # plain help wraps, where columns would be cut
            part.rich_markup_mode = None
    command.params = [option for option in command.params if not (option.name or "").endswith("_completion")]
    try:
        # Without "standalone mode" typer raises instead of printing and ending the process.
        result = command.main(args=words, prog_name=f"megatron-cpt {verb}", standalone_mode=False)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except Exception as caught:
        # typer's usage errors: their class has moved between its versions, their face has not.
        if not hasattr(caught, "format_message"):
            raise
        if type(caught).__name__ == "NoArgsIsHelpError":
            caught.show()  # type: ignore[attr-defined]
            return InputError.exit_code
        asked = getattr(getattr(caught, "ctx", None), "command_path", f"megatron-cpt {verb}")
        raise InputError(f"{caught.format_message()} See `{asked} --help`.") from None
    if result == INTERRUPTED:  # typer has caught it
        raise KeyboardInterrupt
    return result if isinstance(result, int) else 0


def _drop_output() -> None:
    """Where standard output takes no more, forget what is left for it, or Python complains at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_error(message: str, code: int) -> int:
    label = "\033[31merror:\033[0m" if sys.stderr.isatty() else "error:"
    print(f"{label} {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
