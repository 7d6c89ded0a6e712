#!/usr/bin/env bash
# Samples of the shipped generator scenes64, then the whole pipeline from scratch on the embedded data set:
# pretrain at 8 px, invert, distil, grow to 16 and 32 px.
# Hardware: 2 CPU cores, about 15 minutes with the installation. Out come pretrained/samples.png, *.png
# and report.md in runs/quickstart, and one JSON object on the last line. Running it again resumes.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh "[features]"
workdir="${WORKDIR:-runs/quickstart}"
.venv/bin/python -m launch.sample --model=pretrained:scenes64 --num=64 --out="$workdir/pretrained"
exec .venv/bin/python -m launch.pipeline --config=configs/scenes.py --arg=size=quick --num_samples=300 \
  --workdir="$workdir" "$@"
