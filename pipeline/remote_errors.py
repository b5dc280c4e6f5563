"""What an error behind a URL means: a reason in a few words, and whether the same request may succeed later.

HTTP 404, HTTP 403, …   the server refuses this file
HTTP 503, HTTP 429, …   all of 5xx, 408, 425 and 429 are transient
not found               likewise, from storage that does not speak HTTP
access denied           likewise
redirect loop           there are too many redirects
TLS error               for example, a certificate that is not valid
unsupported URL         the URL is not valid, or no package supports its kind
package not installed   fsspec needs another package for this kind of URL
host not found          its name cannot be resolved
connection refused      transient, like all of the following
unreachable             there is no route to the host
timed out               the server sends nothing for a while, or the file takes too long
broken off              the connection ends before the file does
proxy: HTTP 502, …      a proxy in between refuses the request
unreadable              anything else
"""

import errno
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path

from pipeline.retry import StorageError, is_outage

HOST_NOT_FOUND = "host not found"
_MANY, _FEW = 4, 2  # retries; few for errors that take long or rarely go away
_TRANSIENT_STATUS = {408, 425, 429, *range(500, 600)}
_UNREACHABLE = {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTDOWN}

Meaning = tuple[str, bool, int]  # the reason, whether it is transient, and the number of retries
# By the name of the exception's class or of one of its bases, so that no library is imported for it.
_MEANINGS: dict[str, Meaning] = {
    "TooManyRedirects": ("redirect loop", False, 0),
    "gaierror": (HOST_NOT_FOUND, True, _FEW),
    "SSLEOFError": ("broken off", True, _MANY),
    "SSLError": ("TLS error", False, 0),
    "TimeoutError": ("timed out", True, _FEW),
    "ConnectionRefusedError": ("connection refused", True, _MANY),
    "ConnectionError": ("broken off", True, _MANY),
    "ClientPayloadError": ("broken off", True, _MANY),
    "ServerDisconnectedError": ("broken off", True, _MANY),
    "IncompleteRead": ("broken off", True, _MANY),
    "RemoteProtocolError": ("broken off", True, _MANY),
    "PermissionError": ("access denied", False, 0),
    "ImportError": ("package not installed", True, 0),
    "ValueError": ("unsupported URL", False, 0),
    "NonHttpUrlClientError": ("unsupported URL", False, 0),  # that a redirect leads to
}
_SECRETS = re.compile(r"(?i)([?&][^=&#]*(?:sig|token|key|secret|password|credential|auth)[^=&#]*=)[^&#\s]+")
_USER = re.compile(r"(:/{1,3})[^/\s]*@")  # with any number of slashes that normalising a path leaves


def redact(name: str | Path) -> str:
    """Return a path, URL or text with URLs for messages: without passwords and the secrets of signed URLs."""
    text = str(name)
    return _SECRETS.sub(r"\1***", _USER.sub(r"\1", text)) if "://" in text else text


def host_of(name: str) -> str:
    """Return the host or bucket of a URL, or an empty string for a local path."""
    return redact(name).split("/")[2] if "://" in name else ""


@contextmanager
def as_os_error(name: str) -> Iterator[None]:
    """Turn the errors of each kind of storage into OSError.

    FileNotFoundError stays what it is, because some files are optional. The others become StorageError.
    """
    try:
        yield
    except (FileNotFoundError, StorageError, MemoryError):
        raise
    except Exception as error:
        raise _storage_error(name, error) from None


def reason_of(name: str, error: OSError) -> str:
    """Return the reason to reject a file that cannot be read."""
    if isinstance(error, StorageError):
        return error.reason
    if "://" not in name:
        return "unreadable"
    return "HTTP 404" if name.startswith(("http://", "https://")) else "not found"


def reason_in_full(error: OSError, place: str | Path | None = None) -> str:
    """Return which file an error concerns, and why, for a message.

    place: what was read or written, for errors that name no file.
    """
    if isinstance(error, StorageError):
        return str(error)  # which names the file
    name, reason = error.filename or place, str(error.strerror or error)
    return redact(f"{name}: {reason}" if name else reason)


def _storage_error(name: str, error: Exception) -> StorageError:
    reason, transient, retries = _meaning(error)
    text = reason
    if reason in ("unreadable", "unsupported URL", "package not installed"):
        text = redact(str(error)) or type(error).__name__
    return StorageError(f"{redact(name)}: {text}", reason, transient, retries, _retry_after(error))


def _meaning(error: Exception) -> Meaning:
    names = [kind.__name__ for cause in _causes(error) for kind in type(cause).__mro__]
    status = _status(error)
    if status is not None and "TooManyRedirects" not in names:
        if "ClientHttpProxyError" in names:
            return f"proxy: HTTP {status}", True, _FEW
        transient = status in _TRANSIENT_STATUS
        return f"HTTP {status}", transient, _MANY if transient else 0
    for name in names:
        if name in _MEANINGS:
            return _MEANINGS[name]
    errors = {cause.errno for cause in _causes(error) if isinstance(cause, OSError)} - {None}
    if errors & _UNREACHABLE:
        return "unreachable", True, _MANY
    return "unreadable", not isinstance(error, OSError) or is_outage(error), _MANY if errors else _FEW


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error and those that it came from."""
    for _ in range(5):
        if error is None:
            return
        yield error
        error = getattr(error, "os_error", None) or error.__cause__ or error.__context__


def _status(error: Exception) -> int | None:
    """Return the HTTP status of an error, whichever library raised it."""
    own = getattr(error, "status" if hasattr(error, "status") else "code", None)
    for value in (str(own), str(getattr(getattr(error, "response", None), "status_code", None))):
        if value.isdecimal() and 100 <= int(value) < 600:
            return int(value)
    return None


def _retry_after(error: Exception) -> float:
    """Return the seconds that the server asks to wait, or 0."""
    headers = getattr(error, "headers", None) or getattr(getattr(error, "response", None), "headers", None)
    value = (headers or {}).get("Retry-After", "0")
    try:
        return float(value) if value.isdecimal() else parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, AttributeError, OverflowError):
        return 0.0
