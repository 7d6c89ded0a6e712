"""The client of OpenAI-compatible endpoints: what it repeats, and what it refuses at once."""

import http.client
import io
import json

import pytest

from cheapscale.data import chat


def answer(content):
    return io.BytesIO(json.dumps({"choices": [{"message": {"content": content}}]}).encode())


@pytest.mark.parametrize(
    "failure", [http.client.IncompleteRead(b"{"), TimeoutError("timed out"), io.BytesIO(b"<html>")]
)
def test_an_answer_that_is_cut_late_or_no_json_is_asked_for_again(failure, monkeypatch):
    replies, waits = [failure, failure, answer("good")], []

    def urlopen(request, timeout):
        assert timeout == 7 and request.full_url == "http://here/v1/chat/completions"
        reply = replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply

    monkeypatch.setattr(chat.urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(chat.time, "sleep", waits.append)
    assert chat.chat("http://here/v1/", {}, remedy="", timeout=7) == "good"
    assert waits == [1, 2]


@pytest.mark.parametrize("content", [None, " \n", ["a part"]])
def test_an_answer_without_text_is_refused_at_once(content, monkeypatch):
    replies = [answer(content)]
    monkeypatch.setattr(chat.urllib.request, "urlopen", lambda *_, **__: replies.pop())
    with pytest.raises(ValueError, match="holds no text.*: do this"):
        chat.chat("http://here/v1", {}, remedy="do this")
