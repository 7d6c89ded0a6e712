#!/usr/bin/env bash
# Install with the test extra and run every test, in two processes. 2 CPU cores, under 10 minutes
# from a cold start. Arguments go to pytest: `bash launch/test.sh tests/data -x`.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh "[features,test]"
exec .venv/bin/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder "$@"
