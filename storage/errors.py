"""What went wrong with a URL, and whether asking again helps.

Every system behind fsspec raises errors of its own; they are told apart by the HTTP status and the code of the store
where there is one, else by their kind. Input: an exception. Output: a :class:`Verdict`, and a sentence for a person.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from enum import Enum

from schemas.errors import ConfigError, VlprepError
from storage.urls import Url, without_secrets

_TRANSIENT_STATUS = frozenset({408, 409, 416, 425, 429, 499})
"""Statuses below 500 that another attempt may change; 416 comes when a file shrinks between two requests."""

_FINAL_STATUS = frozenset({501, 505})
_BROKEN_OFF = frozenset({"ClientPayloadError", "IncompleteRead", "IncompleteReadError", "ResponseStreamingError"})
"""Names of the errors about an answer that ended too early; aiohttp gives it the status of a bad request."""

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
"""Codes of S3 that another attempt may change, whatever their status: a body that was damaged on its way counts as a
bad request."""

_NETWORK = frozenset({"TimeoutError", "ClientError"})
"""Names of asyncio's and aiohttp's errors that are not among the errors of the operating system."""

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
"""Names of the errors about a request that cannot be made as it is written."""

_FINAL_KINDS = (TypeError, AttributeError, NotImplementedError, ImportError)
_FINAL_ERRNO = frozenset({errno.EINVAL, errno.ENAMETOOLONG, errno.EPERM, errno.ENOSYS, errno.EROFS})


class StorageError(VlprepError):
    """A store that does not answer, however often it is asked. Nothing is lost: the same command goes on."""


class NotThereError(ConfigError):
    """A file, folder or bucket that does not exist."""


class FolderError(NotThereError):
    """A folder where a file was expected."""


class RefusedError(ConfigError):
    """A store that does not let these credentials do what is asked, or cannot do it."""


class ShortReadError(OSError):
    """An answer with fewer bytes than were asked for."""


class DamagedUploadError(OSError):
    """An upload whose size or checksum in the store is not that of the file."""


class Verdict(Enum):
    """What an error means for the request: the first is worth another attempt."""

    TRANSIENT = "transient"
    MISSING = "missing"
    REFUSED = "refused"
    FINAL = "final"


def verdict(error: BaseException) -> Verdict:
    """Whether another attempt could succeed, and if not, why."""
    if isinstance(error, (NotThereError, FileNotFoundError)):
        # Over HTTP every failure looks like a missing file; its cause tells.
        cause = error.__cause__
        of_cause = verdict(cause) if cause is not None and _is_of_network(cause) else Verdict.MISSING
        return Verdict.MISSING if of_cause is Verdict.FINAL else of_cause
    names = {kind.__name__ for found in _chain(error) for kind in type(found).__mro__}
    if isinstance(error, (PermissionError, RefusedError)) or not names.isdisjoint(_CREDENTIALS):
        return Verdict.REFUSED
    if not names.isdisjoint(_BROKEN_OFF):
        return Verdict.TRANSIENT
    if not names.isdisjoint(_WRONG_USE):
        return Verdict.FINAL
    for found in _chain(error):
        if _code(found) in _TRANSIENT_CODES:
            return Verdict.TRANSIENT
        status = _status(found)
        if status is not None:
            return _of_status(status)
    if isinstance(error, (ShortReadError, DamagedUploadError, TimeoutError)):
        return Verdict.TRANSIENT
    if isinstance(error, OSError) and str(error).startswith("Forbidden"):
        # So gcsfs says 403.
        return Verdict.REFUSED
    if isinstance(error, ValueError):
        # An answer that was cut reads as damaged JSON; else it is a request that cannot be.
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
    """Whether a store says that not only the file is missing but its bucket."""
    return any(
        _code(found) == "NoSuchBucket" or "bucket does not exist" in str(found).lower() for found in _chain(error)
    )


def explained(error: Exception, url: Url, how_long: str) -> VlprepError:
    """The error that says what, where and how to mend it.

    Args:
        error: the last one.
        url: what was asked for.
        how_long: attempts and time, in words.
    """
    if isinstance(error, VlprepError):
        return error
    words = describe(error)
    found = verdict(error)
    if found is Verdict.MISSING:
        reason = f" ({words})" if any(map(_code, _chain(error))) else ""
        return NotThereError(f"{url} does not exist{reason}. Check bucket, path and endpoint.")
    if found is Verdict.REFUSED:
        return RefusedError(
            f"{url}: the store refuses access ({words}). Check that the credentials are there, have not expired, and "
            "may list and read (for --out also write and delete) there; docs/object_storage.md says where they are "
            "looked for."
        )
    if found is Verdict.FINAL:
        return RefusedError(
            f"{url}: the store cannot do what was asked ({words}). Check the URL, the endpoint, and whether temporary "
            "credentials have expired."
        )
    return StorageError(
        f"{url}: no good answer in {how_long}, the last: {words}. Nothing is lost; run the same command again to go on."
    )


def describe(error: BaseException) -> str:
    """The first line of what a library says, with the store's own code, without passwords and signatures."""
    text = str(error).strip().splitlines()
    said = text[0] if text else ""
    code = next((code for found in _chain(error) if (code := _code(found)) and code not in said), "")
    name = type(error).__name__
    if not said and "Timeout" in name:
        said = "no complete answer in time"
    parts = [part for part in (code, said) if part]
    return without_secrets(": ".join(parts if code or " " in said else [name, *parts]))[:300].rstrip(".")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it was raised from."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


def _response(error: BaseException) -> object:
    return getattr(error, "response", None)


def _code(error: BaseException) -> str:
    """The code that botocore found in the answer."""
    response = _response(error)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def _status(error: BaseException) -> int | None:
    """The HTTP status: in botocore's response, as httpx's response, or an attribute of aiohttp's and gcsfs's errors."""
    response = _response(error)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        found = getattr(response, "status_code", None) or getattr(error, "status", None) or getattr(error, "code", None)
    return int(found) if isinstance(found, (int, str)) and str(found).isdigit() else None
