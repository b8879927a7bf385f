"""Errors that end the process with one sentence for the operator."""


class FatalError(Exception):
    """The service cannot start or continue; the message is one sentence that says what to change, without secrets."""

    exit_code = 1


class BadSettings(FatalError):
    """A setting or its file is wrong."""

    exit_code = 2


class BackgroundTaskFailed(FatalError):
    """A background task died; other processes of the service may continue."""


class AddressUnavailable(FatalError):
    """An address cannot be bound; the message names it and the cause."""
