"""Errors that end the process with one sentence for the operator."""


class FatalError(Exception):
    """The service cannot start or go on; the message is one sentence that says what to change, without a secret."""

    exit_code = 1


class BadSettings(FatalError):
    """A setting or a file named by one is wrong."""

    exit_code = 2


class BackgroundTaskFailed(FatalError):
    """A background task of this process died; another process of the service may go on."""


class AddressUnavailable(FatalError):
    """An address cannot be bound; the message names it and the cause."""
