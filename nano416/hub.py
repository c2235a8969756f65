"""One error text for everything that downloads from or uploads to the Hugging Face Hub, or reads a URL.

with hub_errors("karpathy/fineweb-edu-100B-gpt2-token-shards"):
    hf_hub_download(...)
with remote_errors("https://example.org/a.jsonl.gz"):
    file.read()
"""

import contextlib
import errno
from collections.abc import Iterator

LOCAL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)


@contextlib.contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Turn what the Hub client raises into one line about `repo`.

    Raises ValueError if the Hub refuses (no such name, gated, private) and ConnectionError if it cannot be reached.
    Other ValueErrors and errors of the local disk pass unchanged.
    """
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"{repo!r} is not the name of a Hub repository; write USER/NAME") from error
    except ValueError:
        raise
    # The client, its HTTP library (whose errors are not OSErrors) and `datasets` have no common base class.
    except Exception as error:
        if isinstance(error, OSError) and error.errno in LOCAL_ERRORS:
            raise
        status = _status_code(error)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if status in (401, 403):
            # The Hub answers 401, not 404, to anonymous requests for a repository that does not exist.
            advice = "check the name; if it is private or gated, accept its terms on the Hub, then run `hf auth login`"
            raise ValueError(f"{repo}: the Hub says {status}; {advice}") from error
        # 408 and 429 ask the client to come back later; the other 4xx stay as they are however often one asks.
        if status is not None and 400 <= status < 500 and status not in (408, 429):
            raise ValueError(f"{repo}: the Hub says {status}; check the name ({reason})") from error
        raise ConnectionError(f"{repo}: the Hub cannot be reached ({reason}); try again later") from error


@contextlib.contextmanager
def remote_errors(url: str) -> Iterator[None]:
    """Turn what fsspec and its drivers raise into one line about `url`. Errors of local paths pass unchanged.

    Raises ValueError if there is no such file, or no driver for it, and ConnectionError if the transfer fails.
    """
    if "://" not in url:
        yield
        return
    try:
        yield
    except ImportError as error:
        raise ValueError(f"{url}: {error}{_driver_advice(url)}") from error
    except ValueError as error:
        if "range requests" not in str(error):
            raise
        raise ValueError(f"{url}: the server sends whole files only; download it and name the local file") from error
    # The drivers (aiohttp, s3fs, gcsfs, the Hub's) have no common base class.
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        status = _status_code(error)
        # For HTTP fsspec calls every failure a missing file; the error behind it tells what is wrong.
        cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
        reason = " ".join(str(cause).split())[:200] or type(cause).__name__
        is_unreachable = status not in (None, 404, 410) or isinstance(error.__cause__, OSError)
        if status in (401, 403) or isinstance(error, PermissionError):
            raise ValueError(f"{url}: no permission to read it ({reason})") from error
        if isinstance(error, FileNotFoundError) and not is_unreachable:
            raise ValueError(f"{url}: no such file ({reason})") from error
        raise ConnectionError(f"{url}: cannot be read ({reason}); run the same command again to continue") from error


def _driver_advice(url: str) -> str:
    """`; pip install gcsfs` for gs://..., where fsspec knows the package."""
    from fsspec.registry import known_implementations

    package = known_implementations.get(url.partition("://")[0], {"class": "fsspec"})["class"].partition(".")[0]
    return "" if package == "fsspec" else f"; pip install {package}"


def _status_code(error: BaseException | None) -> int | None:
    """HTTP status of the answer behind `error` or behind one of its causes."""
    while error is not None:
        # A dict in botocore. aiohttp has the number in the error itself.
        status = getattr(getattr(error, "response", None), "status_code", getattr(error, "status", None))
        if isinstance(status, int):
            return status
        error = error.__cause__
    return None
