"""Every error a caller can meet, in one tree.

::

    MinivllmError
    ├── InvalidRequestError  (also a ValueError)   400  the request can't be served as it is
    │   ├── ContextLengthError                     400  more tokens than the context holds
    │   ├── ModelNotFoundError                     404  no such model here
    │   ├── RequestNotFoundError                   404  no such request is being answered
    │   ├── InvalidApiKeyError                     401  no API key, or a wrong one
    │   ├── BodyTooLargeError                      413  more bytes than --max-body-size
    │   ├── HeadersTooLargeError                   431  over --max-header-size or --max-header-count
    │   └── SlowRequestError                       408  the request itself came too slowly
    ├── EngineDeadError                            500  the engine process is gone
    ├── RequestFailedError                         500  this request's step raised
    ├── MessageError                                -   server and engine process don't understand each other
    ├── EngineRestartingError                      503  a new engine process is being started
    ├── OverloadedError                            503  over --max-waiting-requests or --max-waiting-tokens
    ├── RateLimitError                             429  over --key-tokens-per-minute
    ├── DeadlineError                              504  not finished within the request's own timeout
    ├── ShuttingDownError                          503  the server drains
    ├── StartupError         (also a ValueError)    -   can't start: one clear line, exit code 1
    │   ├── ConfigError                                 a flag or a combination of flags
    │   ├── ModelLoadError                              a model's files
    │   └── OutOfMemoryError                            doesn't fit; the message says what would
    └── TraceError           (also a ValueError)    -   a trace file can't be used, or what is asked of it

Bad input is always one of these, never an ``assert`` (``python -O`` strips asserts).
"""

from __future__ import annotations


class MinivllmError(Exception):
    """Base of everything this package raises on purpose."""

    http_status = 500
    type = "internal_error"  # OpenAI's error type, in the envelope's "type"
    code: str | None = None  # OpenAI's error code, in the envelope's "code"
    retry_after: int | None = None
    """Seconds after which another try makes sense: the header Retry-After."""

    def __init__(self, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        if retry_after is not None:
            self.retry_after = retry_after


class InvalidRequestError(MinivllmError, ValueError):
    """A request that can't be served as it is. ``param`` names the field at fault, if one is."""

    http_status = 400
    type = "invalid_request_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(InvalidRequestError):
    """More tokens than the model's context (``--max-model-len``) holds."""

    code = "context_length_exceeded"


class ModelNotFoundError(InvalidRequestError):
    """The request names a model that this server doesn't serve."""

    http_status = 404
    code = "model_not_found"


class RequestNotFoundError(InvalidRequestError):
    """No request of that id is being answered."""

    http_status = 404
    code = "request_not_found"


class InvalidApiKeyError(InvalidRequestError):
    """The request brings none of the server's API keys."""

    http_status = 401
    code = "invalid_api_key"


class BodyTooLargeError(InvalidRequestError):
    """The request's body has more bytes than ``--max-body-size``."""

    http_status = 413
    code = "body_too_large"


class HeadersTooLargeError(InvalidRequestError):
    """The request's head is over ``--max-header-size`` or ``--max-header-count``."""

    http_status = 431
    code = "headers_too_large"


class SlowRequestError(InvalidRequestError):
    """The request's head took too long to arrive, or its body stopped on the way."""

    http_status = 408
    code = "slow_request"


class EngineDeadError(MinivllmError):
    """The engine process ended; the request can't be finished."""

    code = "engine_dead"


class RequestFailedError(MinivllmError):
    """The engine failed while it computed this request; others go on."""

    code = "request_failed"


class MessageError(MinivllmError):
    """What the server or the engine process got from the other is no message that it knows."""


class EngineRestartingError(MinivllmError):
    """The engine process ended, and another isn't ready yet."""

    http_status = 503
    type = "service_unavailable"
    code = "engine_restarting"
    retry_after = 5


class OverloadedError(MinivllmError):
    """So much waits already that this request isn't taken in."""

    http_status = 503
    type = "service_unavailable"
    code = "overloaded"


class RateLimitError(MinivllmError):
    """This API key has used up its tokens for now."""

    http_status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class DeadlineError(MinivllmError):
    """The request couldn't be finished within the time that it gave."""

    http_status = 504
    type = "timeout_error"
    code = "deadline_exceeded"


class ShuttingDownError(MinivllmError):
    """The server has been told to stop and takes no new requests."""

    http_status = 503
    type = "service_unavailable"
    code = "shutting_down"


class StartupError(MinivllmError, ValueError):
    """The engine can't start as configured. The command line prints the message and exits with 1."""


class ConfigError(StartupError):
    """A flag's value, or a combination of flags, is wrong."""


class ModelLoadError(StartupError):
    """A model's files are missing, malformed, or of a kind that isn't supported."""


class OutOfMemoryError(StartupError):
    """Weights or KV cache don't fit. The message says what to change, and to what."""


class TraceError(MinivllmError, ValueError):
    """A trace file can't be read, isn't one, is cut short, or doesn't hold what was asked for."""
