"""The three errors that speak to the user, each in one message: what was found, what was needed, what to do."""


class RequestError(ValueError):
    """A request that cannot be served; the message says what was found, what was needed and what to do."""


class CheckpointError(ValueError):
    """A model's files are not what they must be; the message says what was found, what was needed and what to do."""


class BackendError(RuntimeError):
    """A forced backend, device or dtype cannot run what was asked."""
