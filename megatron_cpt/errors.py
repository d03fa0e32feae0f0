"""The closed family of errors a user can meet.

Every message says what was got, what was expected and what to do. The command line prints the
message alone and ends with `exit_code`; anything outside this family is a defect and keeps its
traceback, but for what the operating system refuses (`error_of_system`).
"""

from __future__ import annotations

import errno


class CptError(Exception):
    """A failure that the user can act on (exit code 1)."""

    exit_code = 1


class InputError(CptError):
    """Wrong input: nothing was written and nothing has to be undone (exit code 2)."""

    exit_code = 2


class ConfigError(InputError):
    """A configuration that cannot mean anything, or not on this machine."""


class TokenizerError(InputError):
    """A tokenizer that is missing, damaged, or not the one that belongs here."""


class CheckpointError(InputError):
    """A checkpoint that is missing, damaged, unsafe, or of another model."""


class DataError(InputError):
    """A corpus or an indexed dataset that cannot be used as it is."""


class TooLittleText(DataError):
    """A text that is sound, but too short for what it shall tell."""


class KernelUnsupported(InputError):
    """A named implementation of an op that cannot run here; the message holds the reason."""


class TrainingError(CptError):
    """A training job that failed after it had begun."""


class VerificationError(CptError):
    """A proof that failed: the artefact is not what it has to equal."""


# What the system refuses because of the path it was given -> what to do.
_WRONG_PATHS = {
    errno.EACCES: "choose a path that you may use, or change its permissions",
    errno.EPERM: "choose a path that you may use, or change its permissions",
    errno.EROFS: "choose a path on a file system that can be written",
    errno.ENOTDIR: "a file stands where a folder is needed; choose another path",
    errno.EISDIR: "a folder stands where a file is needed; choose another path",
    errno.EEXIST: "choose another path, or move away what is there",
}
_FAILURES = {
    errno.ENOENT: "check the path and the folders above it",
    errno.ENOSPC: "free some space, or choose another disk",
    errno.EDQUOT: "free some space, or choose another disk",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EPIPE: "its reader has gone; start again with one that stays",
}


def error_of_system(caught: OSError) -> CptError:
    """What the operating system has refused, as an error of this family: the path, the reason, what to do.

    Raises:
        OSError: `caught` itself where it does not come from the system: then it is a defect like any other.
    """
    if caught.errno is None:
        raise caught
    path = f"{caught.filename}: " if caught.filename is not None else ""
    reason = f"{path}{caught.strerror or type(caught).__name__}"
    if caught.errno in _WRONG_PATHS:
        return InputError(f"{reason}; {_WRONG_PATHS[caught.errno]}")
    return CptError(f"{reason}; {_FAILURES.get(caught.errno, 'see whether the file or device is in order')}")
