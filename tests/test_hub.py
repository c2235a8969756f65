"""nano416/hub.py: whatever the Hub client raises is one line with the next action."""

import types

import pytest

from nano416.hub import hub_errors


class ServerAnswer(Exception):
    def __init__(self, status_code: int):
        super().__init__(f"Client error {status_code}\nfor url ...")
        self.response = types.SimpleNamespace(status_code=status_code)


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (ServerAnswer(404), ValueError, r"me/x: the Hub says 404; check the name \(Client error 404\)$"),
        (ServerAnswer(401), ValueError, "me/x: the Hub says 401; .*hf auth login"),
        (ServerAnswer(403), ValueError, "me/x: the Hub says 403; .*hf auth login"),
        (ServerAnswer(429), ConnectionError, "me/x: the Hub cannot be reached"),
        (ServerAnswer(503), ConnectionError, "me/x: the Hub cannot be reached"),
        (Exception("Name or service not known"), ConnectionError, r"cannot be reached \(Name or service not known\)"),
        (ValueError("ours"), ValueError, "^ours$"),
        (OSError(28, "No space left on device"), OSError, "^.Errno 28. No space left on device$"),
    ],
)
def test_an_error_of_the_client_becomes_one_line(raised, kind, message):
    with pytest.raises(kind, match=message) as error, hub_errors("me/x"):
        raise raised
    assert "\n" not in str(error.value)


def test_the_answer_behind_another_error_counts():
    with pytest.raises(ValueError, match="the Hub says 403"), hub_errors("me/x"):
        raise FileNotFoundError("not in the cache") from ServerAnswer(403)


def test_a_name_that_cannot_be_one_is_refused():
    from huggingface_hub.errors import HFValidationError

    message = "'a/b/c' is not the name of a Hub repository; write USER/NAME"
    with pytest.raises(ValueError, match=message), hub_errors("a/b/c"):
        raise HFValidationError("Repo id must be in the form ...")
