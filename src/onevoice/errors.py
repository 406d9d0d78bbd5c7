"""Every error that a user can cause, in one tree.

    OnevoiceError
    ├── AudioError              a file or array is not usable audio
    ├── CorpusError             a corpus or set of trials does not hold what the task needs
    ├── ConfigError             an unknown key, a wrong type or a value out of range
    ├── CheckpointError         a checkpoint is unreadable or belongs to another model
    ├── MetricError             a metric has no value for these signals (silent, too short); counted, not fatal
    ├── TrainingError           training cannot continue (for example, the loss is no longer finite)
    ├── WorkerError             a worker process died
    ├── StorageError            a file cannot be written (disk full, no permission)
    └── MissingDependencyError  an optional package that one command needs is not installed

The message is one line that names the file or key and says what to do. Commands print it to standard error and exit
with status 2, so a traceback always means a bug in onevoice.
"""


class OnevoiceError(Exception):
    """The base class of all errors that the user can fix."""


class AudioError(OnevoiceError):
    """A file or array is not usable audio."""


class CorpusError(OnevoiceError):
    """A corpus or set of trials does not hold what the task needs."""


class ConfigError(OnevoiceError):
    """A config has an unknown key, a wrong type or a value out of range."""


class CheckpointError(OnevoiceError):
    """A checkpoint is unreadable or belongs to another model."""


class MetricError(OnevoiceError):
    """A metric has no value for these signals; evaluation counts it and continues."""


class TrainingError(OnevoiceError):
    """Training cannot continue."""


class WorkerError(OnevoiceError):
    """A worker process died."""


class StorageError(OnevoiceError):
    """A file cannot be written."""


class MissingDependencyError(OnevoiceError):
    """An optional package is not installed."""
