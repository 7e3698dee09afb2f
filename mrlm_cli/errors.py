"""The exception tree. Whatever a person may see ends in one of these; the command line turns it into one paragraph.

MrlmError                      exit 1: the run failed, through no fault of the recipe
├── UserError                  exit 2: the user's input is wrong
│   ├── RecipeError            a recipe, with file:line:column and key
│   ├── UnknownName            a name that no registry entry or file answers to
│   └── MissingExtra           an optional package is not installed
├── CheckpointError            a checkpoint or model directory is broken, foreign or unreadable
├── RunDirectoryError          a run directory is locked, unwritable or not one
├── NonFiniteError             losses, gradients or rewards stayed non-finite
├── ScoringError               a reward or environment failed on too many sessions
├── EngineError                a completion could not be made
├── SessionFailure             one session of an environment failed: counted, never scored as a wrong answer
│   ├── DeadlineExceeded       it did not answer in time
│   │   └── HungReply          because of a reply: wrong, and no failure
│   └── SandboxFailure         the sandbox itself failed: no verdict about the program in it
└── Interrupted                exit 130 or 143: stopped by a signal, with the state saved
"""


class MrlmError(Exception):
    """Base of all errors that mrlm raises on purpose; `str(error)` is fit for a person's eyes."""

    exit_code = 1


class UserError(MrlmError):
    """The user's input is wrong: a flag, a name, a path, a value."""

    exit_code = 2


class RecipeError(UserError):
    """Something in a recipe is wrong; the text holds one line for each problem: `file:line:column key: what; hint`."""


class UnknownName(UserError):
    """A name stands for nothing that is registered or on disk."""


class MissingExtra(UserError):
    """An optional package is needed and not installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs an optional package: pip install 'mrlm[{extra}]'")


class CheckpointError(MrlmError):
    """A checkpoint or a model directory is broken, foreign or unreadable."""


class RunDirectoryError(MrlmError):
    """A run directory is locked by another process, cannot be written, or is not a run directory."""


class NonFiniteError(MrlmError):
    """Several optimizer steps in a row were refused because something was not finite."""


class ScoringError(MrlmError):
    """A reward or an environment failed on more of the last sessions than it may."""


class EngineError(MrlmError):
    """A completion could not be made."""


class SessionFailure(MrlmError):
    """One session of an environment failed; its episodes are counted as failed and never trained on."""


class DeadlineExceeded(SessionFailure):
    """A session did not answer before its deadline."""


class HungReply(DeadlineExceeded):
    """A reply took too long to judge where the right one does not: it counts as wrong, not as a failure."""


class SandboxFailure(SessionFailure):
    """A sandbox did not come up, or did not end; says nothing about the program that was to run in it."""


class Interrupted(MrlmError):
    """A signal stopped the run after its state was saved."""

    def __init__(self, signal_number: int, text: str) -> None:
        super().__init__(text)
        self.exit_code = 128 + signal_number
