#!/usr/bin/env bash
# Install with the test extra and run every test. 2 CPU cores, under 15 minutes from a cold start.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh "[test]"
exec .venv/bin/python -m pytest "$@"
