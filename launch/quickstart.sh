#!/usr/bin/env bash
# The whole pipeline on the embedded data set: pretrain at 8 px, invert, distil, grow to 16 and 32 px.
# Hardware: 2 CPU cores, about 13 minutes after the installation. Out come runs/quickstart/*.png,
# report.md, and one JSON object on the last line. Running it again resumes.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh "[features]"
exec .venv/bin/python -m launch.pipeline --config=configs/scenes.py --arg=size=quick --num_samples=300 \
  --workdir="${WORKDIR:-runs/quickstart}" "$@"
