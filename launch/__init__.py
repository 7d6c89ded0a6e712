"""The commands. JAX reads its JAX_* variables while it is imported, before any net for errors."""

import os
import sys

try:
    import jax  # noqa: F401
except Exception as error:
    names = sorted(name for name in os.environ if name.startswith("JAX_"))
    if not names:
        raise
    sys.exit(f"error: JAX cannot start ({error}): correct or unset {', '.join(names)}")
