#!/usr/bin/env bash
# The whole check: environment, lint, types, tests. Arguments reach pytest: tests/run.sh -m slow, tests/run.sh -k model
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ./launch_training.sh
make_environment requirements.txt requirements-dev.txt
say "ruff" && ruff format --check . && ruff check .
say "pyright" && pyright
say "pytest" && python -m pytest "$@"
