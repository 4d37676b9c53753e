"""What went wrong with a URL, and whether a retry helps.

Every file system behind fsspec raises its own errors. They are classified by HTTP status and by the store's error code
where there is one, else by type. Input: an exception. Output: a :class:`Verdict`, and a sentence for a person.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from enum import Enum

from schemas.errors import ConfigError, VlprepError
from storage.urls import without_secrets

_TRANSIENT_STATUS = frozenset({408, 409, 416, 425, 429, 499})
"""Statuses below 500 that a retry may change; 416 is the answer when a file shrinks between two requests."""

_FINAL_STATUS = frozenset({501, 505})
_BROKEN_ANSWER = frozenset(
    {"BadHttpMessage", "ClientPayloadError", "IncompleteRead", "IncompleteReadError", "ResponseStreamingError"}
)
"""Names of the errors about an answer that ended too early or is not HTTP; aiohttp reports it as a bad request."""

_TRANSIENT_CODES = frozenset(
    {
        "BadDigest",
        "IncompleteBody",
        "InternalError",
        "OperationAborted",
        "PriorRequestNotComplete",
        "RequestTimeout",
        "RequestTimeoutException",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
        "XAmzContentChecksumMismatch",
        "XAmzContentSHA256Mismatch",
    }
)
"""Codes of S3 that a retry may change, whatever their status: S3 calls a body damaged in transit a bad request."""

_NETWORK = frozenset({"TimeoutError", "ClientError"})
"""Names of errors of asyncio and aiohttp that are not an OSError."""

_CREDENTIALS = frozenset(
    {
        "NoCredentialsError",
        "PartialCredentialsError",
        "CredentialRetrievalError",
        "TokenRetrievalError",
        "ProfileNotFound",
        "UnauthorizedSSOTokenError",
        "SSOTokenLoadError",
        "DefaultCredentialsError",
        "RefreshError",
        "GatedRepoError",
        "RepositoryNotFoundError",
        "LocalTokenNotFoundError",
    }
)
"""Names of the errors by which botocore, google-auth and huggingface_hub say that credentials are missing or wrong."""

_WRONG_USE = frozenset(
    {
        "ParamValidationError",
        "InvalidRegionError",
        "NoRegionError",
        "UnknownEndpointError",
        "ConfigParseError",
        "ConfigNotFound",
        "InvalidEndpointDiscoveryConfigurationError",
        "SSLCertVerificationError",
        "InvalidURL",
        "InvalidUrlClientError",
        "HFValidationError",
    }
)
"""Names of the errors about an invalid request."""

_FINAL_KINDS = (TypeError, AttributeError, NotImplementedError, ImportError)
_FINAL_ERRNO = frozenset({errno.EINVAL, errno.ENAMETOOLONG, errno.EPERM, errno.ENOSYS, errno.EROFS})


class StorageError(VlprepError):
    """A store that does not answer, however often the request is retried. Nothing is lost: the same command resumes."""


class NotThereError(ConfigError):
    """A file, folder or bucket that does not exist."""


class FolderError(NotThereError):
    """A folder where a file was expected."""


class RefusedError(ConfigError):
    """A store that refuses these credentials, or does not support the request."""


class ShortReadError(OSError):
    """An answer with fewer bytes than requested."""


class DamagedUploadError(OSError):
    """An upload whose size or checksum in the store is not that of the file."""


class Verdict(Enum):
    """What an error means for the request. Only the first is retried."""

    TRANSIENT = "transient"
    MISSING = "missing"
    REFUSED = "refused"
    FINAL = "final"


def verdict(error: BaseException) -> Verdict:
    """Whether a retry could succeed, and if not, why."""
    if isinstance(error, (NotThereError, FileNotFoundError)):
        # fsspec reports every failure over HTTP as a missing file; the cause tells them apart.
        cause = error.__cause__
        of_cause = verdict(cause) if cause is not None and _is_of_network(cause) else Verdict.MISSING
        return Verdict.MISSING if of_cause is Verdict.FINAL else of_cause
    names = {kind.__name__ for link in _chain(error) for kind in type(link).__mro__}
    if isinstance(error, (PermissionError, RefusedError)) or not names.isdisjoint(_CREDENTIALS):
        return Verdict.REFUSED
    if isinstance(error, ConfigError):
        # A protocol that fsspec does not know, or a package that is not installed.
        return Verdict.FINAL
    if not names.isdisjoint(_BROKEN_ANSWER):
        return Verdict.TRANSIENT
    if not names.isdisjoint(_WRONG_USE):
        return Verdict.FINAL
    for link in _chain(error):
        if _code(link) in _TRANSIENT_CODES:
            return Verdict.TRANSIENT
        status = _status(link)
        if status is not None:
            return _of_status(status)
    if isinstance(error, (ShortReadError, DamagedUploadError, TimeoutError)):
        return Verdict.TRANSIENT
    if isinstance(error, OSError) and str(error).startswith("Forbidden"):
        # gcsfs reports 403 this way.
        return Verdict.REFUSED
    if isinstance(error, ValueError):
        # A truncated answer reads as damaged JSON; any other ValueError is about the request.
        return Verdict.TRANSIENT if isinstance(error, json.JSONDecodeError) else Verdict.FINAL
    if isinstance(error, _FINAL_KINDS) or (isinstance(error, OSError) and error.errno in _FINAL_ERRNO):
        return Verdict.FINAL
    return Verdict.TRANSIENT


def _is_of_network(error: BaseException) -> bool:
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, OSError) or _status(error) is not None or not names.isdisjoint(_NETWORK)


def _of_status(status: int) -> Verdict:
    if status in _TRANSIENT_STATUS or (status >= 500 and status not in _FINAL_STATUS):
        return Verdict.TRANSIENT
    if status in (404, 410):
        return Verdict.MISSING
    return Verdict.REFUSED if status in (401, 403) else Verdict.FINAL


def says_no_bucket(error: BaseException) -> bool:
    """Whether a store reports that not only the file but its bucket is missing."""
    return any(_code(link) == "NoSuchBucket" or "bucket does not exist" in str(link).lower() for link in _chain(error))


def explained(error: Exception, where: object, duration: str) -> VlprepError:
    """The error that says what is wrong, where, and how to fix it.

    Args:
        error: of the last attempt.
        where: what the messages name.
        duration: attempts and time, in words.
    """
    if isinstance(error, VlprepError):
        return error
    words = describe(error)
    match verdict(error):
        case Verdict.MISSING:
            reason = f" ({words})" if any(map(_code, _chain(error))) else ""
            return NotThereError(f"{where} does not exist{reason}. Check bucket, path and endpoint.")
        case Verdict.REFUSED:
            return RefusedError(
                f"{where}: the store refuses access ({words}). Check that the credentials exist, have not expired, "
                "and may list and read (for --out also write and delete) there; docs/object_storage.md lists where "
                "they are read from."
            )
        case Verdict.FINAL:
            return RefusedError(
                f"{where}: the store does not support the request ({words}). Check the URL, the endpoint, and whether "
                "temporary credentials have expired."
            )
        case Verdict.TRANSIENT:
            return StorageError(
                f"{where}: no valid response in {duration}, last error: {words}. Nothing is lost; run the same command "
                "again to resume."
            )


def describe(error: BaseException) -> str:
    """The first line of a library's message, with the store's error code, without passwords and signatures."""
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None and verdict(error) is Verdict.TRANSIENT:
        error = error.__cause__  # over HTTP it only repeats the URL
    text = str(error).strip().splitlines()
    message = text[0] if text else ""
    code = next((code for link in _chain(error) if (code := _code(link)) and code not in message), "")
    name = type(error).__name__
    if not message and "Timeout" in name:
        message = "no complete answer in time"
    parts = [part for part in (code, message) if part]
    return without_secrets(": ".join(parts if code or " " in message else [name, *parts]))[:300].rstrip(".")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and the errors that it was raised from."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__


def _response(error: BaseException) -> object:
    return getattr(error, "response", None)


def _code(error: BaseException) -> str:
    """The error code that botocore read from the answer."""
    response = _response(error)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def _status(error: BaseException) -> int | None:
    """The HTTP status: in botocore's response, as httpx's response, or an attribute of aiohttp's and gcsfs's errors."""
    response = _response(error)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        status = (
            getattr(response, "status_code", None) or getattr(error, "status", None) or getattr(error, "code", None)
        )
    return int(status) if isinstance(status, (int, str)) and str(status).isdigit() else None
