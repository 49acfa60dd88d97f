#!/usr/bin/env bash
# Resolves both lock files anew. Arguments go to the resolution for the CPU and say where torch's CPU build is found, for
# example: locks/compile.sh --extra-index-url https://download.pytorch.org/whl/cpu --index-strategy unsafe-best-match
# torch is left out of cpu.txt: the Makefile and the Dockerfile install the CPU build in a step of its own.
set -euo pipefail
cd "$(dirname "$0")/.."
common=(pyproject.toml --extra dev --python-version 3.11 --python-platform x86_64-unknown-linux-gnu
        --no-annotate --no-header --quiet)
uv pip compile "${common[@]}" --extra train-gpu -o locks/gpu.txt
uv pip compile "${common[@]}" --extra train-cpu --override locks/overrides-cpu.txt --no-emit-package torch \
   -o locks/cpu.txt "$@"
