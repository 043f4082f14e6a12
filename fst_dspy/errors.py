"""Errors that fst_dspy raises on purpose.

Every kind is also a standard-library exception, so that callers who know nothing of
this package can catch it. A message says what is wrong and what to do about it.
"""

LOST = (ConnectionError, TimeoutError, MemoryError)
"""Errors of what a program runs on, not of the program: nothing is to be learned from them."""

MOST_SAID = 4000
"""Characters of an error's message that are kept: some hold a whole page or document."""


def said_of(error: BaseException) -> str:
    """An error in words: its kind and its message, as much of it as can be had."""
    kind = type(error).__name__
    try:
        return f"{kind}: {error}"[:MOST_SAID]
    except Exception as own:
        return f"{kind}, whose message cannot be read ({type(own).__name__})"


class FSTError(Exception):
    """Base of every error that fst_dspy raises on purpose."""


class ConfigError(FSTError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class DataError(FSTError, ValueError):
    """A training, validation or test set that cannot be used."""


class ProgramError(FSTError, TypeError):
    """A DSPy program that FST cannot tune: no predictors, no local model."""


class MetricError(FSTError, TypeError):
    """A metric with the wrong signature, or one that returns no usable score."""


class ModelError(FSTError, OSError):
    """A model that cannot be loaded, or weights that are no longer at hand."""


class PromptTooLongError(FSTError, ValueError):
    """A prompt that leaves no room for a completion in the model's context window."""


class StoreError(FSTError, OSError):
    """A run folder that cannot be read, written or resumed."""


class TrainingError(FSTError, RuntimeError):
    """Training that cannot go on, such as a loss that stays non-finite."""


class CompileInterrupted(KeyboardInterrupt):
    """Ctrl-C in a compile.

    Attributes:
        folder: The run folder, which holds what was reached; ``None`` where nothing was saved.
        at_once: Whether the step under way was given up: the folder holds what was reached at the
            checkpoint before.
    """

    def __init__(self, folder: str | None, at_once: bool) -> None:
        self.folder, self.at_once = folder, at_once
        how = (
            f"start it again with log_dir={folder!r} to go on where it was saved"
            if folder is not None
            else "without a log_dir nothing was saved; set one to be able to resume"
        )
        super().__init__(f"compile interrupted{' at once' * at_once}; {how}")
