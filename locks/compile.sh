#!/usr/bin/env bash
# Resolves both lock files with uv. Arguments are passed to the resolution of cpu.txt and give the index of torch's CPU
# build: locks/compile.sh --extra-index-url https://download.pytorch.org/whl/cpu --index-strategy unsafe-best-match
# cpu.txt does not contain torch, since the Makefile and the Dockerfile install its CPU build in a separate step.
set -euo pipefail
cd "$(dirname "$0")/.."
common=(pyproject.toml --extra dev --python-version 3.11 --python-platform x86_64-unknown-linux-gnu
        --no-annotate --no-header --quiet)
uv pip compile "${common[@]}" --extra train-gpu -o locks/gpu.txt
uv pip compile "${common[@]}" --extra train-cpu --override locks/overrides-cpu.txt --no-emit-package torch \
   -o locks/cpu.txt "$@"
