"""A client of OpenAI-compatible endpoints: it writes captions and proposes widths."""

import http.client
import json
import os
import time
import urllib.error
import urllib.request

KEY = "OPENAI_API_KEY"
AGAIN = (408, 409, 429, 500, 502, 503, 504, 529)  # states that may pass


def check_address(url: str, option: str) -> None:
    """Raises ValueError if `url`, the value of `option`, is no address."""
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{option}={url} is no address: give {option}=http://localhost:8000/v1")


def chat(url: str, body: dict, *, remedy: str, retries: int = 5, timeout: float = 300.0) -> str:
    """The text of the reply to `body`, which holds the model and the messages.

    url: the address before /chat/completions; the environment variable OPENAI_API_KEY holds its
    key, if it needs one. A failure that may pass is repeated after 1, 2, 4 ... 60 seconds. timeout:
    seconds that a reply may take. Raises ValueError with `remedy` for every other failure, and for
    a reply without text.
    """
    address = f"{url.rstrip('/')}/chat/completions"
    headers = {"Content-Type": "application/json"}
    if os.environ.get(KEY):
        headers["Authorization"] = f"Bearer {os.environ[KEY]}"
    request = urllib.request.Request(address, json.dumps(body).encode(), headers)
    for tried in range(retries + 1):
        if tried:
            time.sleep(min(2.0 ** (tried - 1), 60.0))
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return content(json.load(answer))
        except urllib.error.HTTPError as error:
            why = f"{error.code} {error.read(300).decode(errors='replace')}"
            if error.code in (401, 403):
                remedy = f"set the environment variable {KEY} to its key"
            if error.code not in AGAIN:
                break
        except LookupError as error:
            why = str(error)
            break
        # no connection, a time-out, an answer that is cut, or no JSON
        except (OSError, http.client.HTTPException, ValueError) as error:
            why = str(error) or type(error).__name__
    raise ValueError(f"{address} did not answer as expected ({why}): {remedy}")


def content(answer: object) -> str:
    """The text of a reply's JSON; LookupError if it holds none."""
    try:
        text = answer["choices"][0]["message"]["content"]
    except (LookupError, TypeError):
        text = None
    if not isinstance(text, str) or not text.strip():
        raise LookupError(f"it holds no text: {json.dumps(answer)[:200]}")
    return text
