"""One short hash for whatever is known by plain values: a source, a statistic, a set of images."""

import hashlib
import json
from typing import Any


def digest(value: Any) -> str:
    """16 hexadecimal digits of the SHA-256 of a JSON value, keys in order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
