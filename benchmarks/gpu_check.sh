#!/usr/bin/env bash
# GPU tests and quick benches in under 9 minutes, from a bare checkout: the package itself need not be
# installed, its dependencies (with pytest) must be. Writes DIR/gpu_check.{json,log} and plots.
#   benchmarks/gpu_check.sh [--out DIR] [--minutes 8.5] [--commit HASH] [--dry-run]
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
out=$root/out
arguments=()
while [ $# -gt 0 ]; do
  case "$1" in
    --out) out=${2:?--out needs a folder}; shift ;;
    --out=*) out=${1#--out=} ;;
    *) arguments+=("$1") ;;
  esac
  shift
done
mkdir -p "$out" || exit
out=$(cd "$out" && pwd)
cd "$root" || exit
export PYTHONPATH=".:kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
"${PYTHON:-python3}" benchmarks/gpu_check.py --out "$out" ${arguments[@]+"${arguments[@]}"} 2>&1 |
  tee "$out/gpu_check.log"
