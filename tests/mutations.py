"""Damaged copies of files for property tests: deterministic, from a seed."""

import contextlib
import gc
import pathlib
import re
import resource
import signal
from collections.abc import Callable, Iterator, Sequence

import numpy as np

EXTREMES = (0, 1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**60, 2**63, 2**64 - 1)
SECONDS, BYTES = 5.0, 2 * 2**30  # for one input


def mutate(rng: np.random.Generator, data: bytes, others: Sequence[bytes]) -> bytes:
    """A damaged copy of `data`; `others` are whole files of other formats to splice with."""

    def place() -> int:  # anywhere, or near the header or the directory at the end
        near = int(rng.integers(min(len(data), 128)))
        return int(rng.choice([rng.integers(len(data)), near, len(data) - 1 - near]))

    start = place()
    end = min(len(data), start + int(2 ** rng.uniform(0, 10)))
    other = others[rng.integers(len(others))]
    match rng.integers(9):
        case 0:  # bits
            out = bytearray(data)
            for _ in range(rng.integers(1, 9)):
                out[place()] ^= 1 << rng.integers(8)
            return bytes(out)
        case 1:
            return data[:start]
        case 2:
            return data[:end] + data[start:]  # twice
        case 3:
            return data[:start] + data[end:]
        case 4:
            return data[:start] + other[int(rng.integers(len(other))) :]
        case 5:
            return other if rng.random() < 0.2 else data + other
        case 6:  # an extreme number in a text
            numbers = list(re.finditer(rb"\d+", data)) or [re.match(b"", data)]
            found = numbers[rng.integers(len(numbers))]
            sign = b"-" * int(rng.integers(2))
            number = str(EXTREMES[rng.integers(len(EXTREMES))]).encode()
            return data[: found.start()] + sign + number + data[found.end() :]
        case 7:  # random bytes
            return data[:start] + rng.bytes(end - start) + data[end:]
        case _:  # an extreme number in binary
            width, order = int(rng.choice([1, 2, 4, 8])), str(rng.choice(["little", "big"]))
            number = EXTREMES[rng.integers(len(EXTREMES))] % 2 ** (8 * width)
            return data[:start] + number.to_bytes(width, order) + data[start + width :]


@contextlib.contextmanager
def bounded() -> Iterator[Callable[[], None]]:
    """A block with BYTES more memory than now; it yields a function that starts the clock of an
    input, which fails after SECONDS."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    gc.collect()

    def late(*_):
        raise AssertionError(f"an input took more than {SECONDS} seconds")

    old = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, before[1]))
    try:
        yield lambda: signal.setitimer(signal.ITIMER_REAL, SECONDS)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
        resource.setrlimit(resource.RLIMIT_AS, before)
