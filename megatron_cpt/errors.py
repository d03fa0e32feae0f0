"""The closed family of errors a user can meet.

Every message says what was got, what was expected and what to do. The command line prints the
message alone and ends with `exit_code`; anything outside this family is a defect and keeps its
traceback.
"""


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


class KernelUnsupported(InputError):
    """A named implementation of an op that cannot run here; the message holds the reason."""


class TrainingError(CptError):
    """A training job that failed after it had begun."""


class VerificationError(CptError):
    """A proof that failed: the artefact is not what it has to equal."""
