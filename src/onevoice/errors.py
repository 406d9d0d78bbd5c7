"""Every error that a user can cause, in one tree.

    OnevoiceError
    ├── AudioError              a file or an array that is not usable sound
    ├── CorpusError             too few speakers, files or trials for what was asked
    ├── ConfigError             an unknown key, a wrong type, a value out of range
    ├── CheckpointError         an unreadable checkpoint, or one of another model
    ├── MetricError             a metric has no value for these signals (silence, too short); counted, not fatal
    ├── TrainingError           training cannot go on (no finite loss any more)
    ├── WorkerError             a helper process died
    ├── StorageError            a file cannot be written (disk full, no permission)
    └── MissingDependencyError  an optional package that one command needs

The message is one line that names the file or key and says what to do. Commands print it to standard error
and exit with status 2; a traceback therefore always means a defect of onevoice itself.
"""


class OnevoiceError(Exception):
    """The root of all errors raised for something the user can put right."""


class AudioError(OnevoiceError):
    """A file or an array is not usable sound."""


class CorpusError(OnevoiceError):
    """A corpus or a folder of trials does not hold what the task needs."""


class ConfigError(OnevoiceError):
    """A configuration has an unknown key, a wrong type or a value out of range."""


class CheckpointError(OnevoiceError):
    """A checkpoint cannot be read, or belongs to another model."""


class MetricError(OnevoiceError):
    """A metric has no value for these signals; evaluation counts it and goes on."""


class TrainingError(OnevoiceError):
    """Training cannot go on."""


class WorkerError(OnevoiceError):
    """A helper process died."""


class StorageError(OnevoiceError):
    """A file cannot be written."""


class MissingDependencyError(OnevoiceError):
    """An optional package is not installed."""
