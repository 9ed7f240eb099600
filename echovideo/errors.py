"""Errors a person can act on, each with a stable code that outcomes, HTTP answers and reports share."""

from __future__ import annotations

from collections.abc import Mapping


class EchoVideoError(Exception):
    """Base of every error raised for a user; the message says what was wrong, where, and what to do.

    `code` is a stable snake_case word; `numbers` holds the measurements behind the message.
    """

    code = "error"

    def __init__(self, message: str, *, code: str | None = None, numbers: Mapping[str, float] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.numbers: dict[str, float] = dict(numbers or {})

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.code, self.numbers)


def _rebuild(kind: type[EchoVideoError], message: str, code: str, numbers: dict[str, float]) -> EchoVideoError:
    return kind(message, code=code, numbers=numbers)


class RequestError(EchoVideoError, ValueError):
    """A request's values cannot be rendered: size, frames, steps, tier and the like."""

    code = "invalid_request"


class PhotoRefusedError(EchoVideoError):
    """A photo cannot give an identity: unreadable, no face, several faces, too small, blurred or turned."""

    code = "photo_refused"


class WeightsError(EchoVideoError):
    """A model folder is incomplete, damaged or not the one asked for; the message names the file and tensor."""

    code = "weights"


class StorageError(EchoVideoError):
    """A file or object cannot be read or written, or its address is not allowed."""

    code = "storage"


class RunError(EchoVideoError):
    """A run cannot start or go on: bad manifest, too few resources, or another driver holds it."""

    code = "run"


class RenderCancelledError(RunError):
    """The render was stopped between two steps, as its caller asked."""

    code = "cancelled"


class DatasetError(EchoVideoError):
    """Training data is missing, damaged or not what the run needs; the message names the file or the tensor."""

    code = "dataset"


class TrainingError(EchoVideoError):
    """Training cannot start or go on: settings that do not fit, no finite loss, or too little memory."""

    code = "training"
