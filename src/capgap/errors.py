"""Errors that a user can cause.

Each message is one sentence that names the file, key or row, what was found there, and what would be right.
The command line prints it without a stack trace and exits with status 2.
"""


class CapgapError(Exception):
    """Base of every error that a user can mend."""


class RecipeError(CapgapError):
    """A recipe or a command-line value is not valid."""


class DataError(CapgapError):
    """A text source or a packed data folder is missing, empty, broken, or does not fit the tokenizer."""


class ModelError(CapgapError):
    """A model folder is missing, incomplete or damaged, or two models do not fit each other."""


class ShapeError(CapgapError):
    """A shape is impossible: of a student to be cut, or of tensors that must agree."""


class TrainingError(CapgapError):
    """Training cannot go on, such as a loss that is not a finite number."""


class CheckpointError(CapgapError):
    """A checkpoint is damaged or belongs to another run."""


class CacheError(CapgapError):
    """A teacher cache is missing, damaged, or was made from something else than the recipe names."""


class LawError(CapgapError):
    """A law cannot be fitted to, or evaluated on, what was given."""


class StudyError(CapgapError):
    """A study is not valid, or some of its trials failed."""


class StorageError(CapgapError):
    """The operating system refused to write: disk full, no permission."""
