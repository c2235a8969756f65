"""One error text for everything that downloads from or uploads to the Hugging Face Hub.

with hub_errors("karpathy/fineweb-edu-100B-gpt2-token-shards"):
    hf_hub_download(...)
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


def _status_code(error: BaseException | None) -> int | None:
    """HTTP status of the answer behind `error` or behind one of its causes."""
    while error is not None:
        response = getattr(error, "response", None)
        if response is not None:
            return response.status_code
        error = error.__cause__
    return None
