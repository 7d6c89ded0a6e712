"""Short hashes of JSON values, which identify sources, statistics and sets of images."""

import hashlib
import json
from typing import Any


def digest(value: Any) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a JSON value with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
