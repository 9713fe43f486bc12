#!/bin/sh
# The classic name of `make dev_install`, from whatever folder it is called.
set -eu
case "${1-}" in
-h | --help)
  echo "usage: ${0##*/} [PYTHON=python3.12] [TORCH_INDEX=URL]"
  echo "Make .venv with everything in it: the same as 'make dev_install', whose settings it takes."
  echo "All of them: make help"
  exit
  ;;
esac
cd -- "$(dirname -- "$0")"
exec make dev_install "$@"
