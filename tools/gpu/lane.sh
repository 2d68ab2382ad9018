#!/usr/bin/env bash
# On the GPU machine, in the repository root, after receive.sh and as install.sh goes on. Measures on several GPUs at once:
#
#   tools/gpu/lane.sh OUT NAME GPU STEP...     begin measure.sh's steps in the background, on a GPU and its share of the
#                                              cores; several GPUs with commas, as 0,1, and the cores of all
#   tools/gpu/lane.sh OUT NAME GPU -- COMMAND  begin a command instead, in the same environment
#   tools/gpu/lane.sh OUT wait SECONDS [FILE]  wait for all lanes, and print how each ends; then pack OUT into FILE, a
#                                              .tgz in the folder that is brought back
#
# A lane runs from a copy of the tree, since a call replaces the tree, and goes on when the call ends. Once everything is
# installed that its first step needs, it can begin while the rest travels: NEEDS="model draft" makes it wait for these.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${1:?a folder for the results}
name=${2:?the name of a lane, or wait}
home=${KVARN_GPU_HOME:-/opt/kvarn}
shift 2
mkdir -p "$out"

if [ "$name" = wait ]; then
  for ((i = 0; i < ${1:?seconds}; i++)); do
    running=$(find "$out" -maxdepth 1 -name '*.lane' | wc -l)
    [ "$running" -gt 0 ] || break
    sleep 1
  done
  echo "waited $i s, $running lanes still run"
  for log in "$out"/*.txt; do echo "## $log" && tail -n "${LINES_EACH:-15}" "$log" | cut -c1-300; done
  [ -z "${2-}" ] || tar czf "$2" -C "$out" .
  exit
fi

gpus=${1:?the number of a GPU, or several with commas}
shift
mkdir -p "$home/lanes/$name" && cp -r . "$home/lanes/$name"
touch "$out/$name.lane"
export CUDA_VISIBLE_DEVICES=$gpus VLLM_CACHE_ROOT=$home/cache/vllm-$name # lanes compile at the same time
cores=$(($(nproc) / $(nvidia-smi --list-gpus | wc -l)))
of_lane=
for gpu in ${gpus//,/ }; do of_lane+=${of_lane:+,}$((gpu * cores))-$(((gpu + 1) * cores - 1)); done
cd "$home/lanes/$name"
# shellcheck disable=SC2016 # expanded by the shell that it starts
setsid nohup taskset -c "$of_lane" bash -c '
  for step in ${NEEDS-}; do until [ -e "$0/$step.done" ]; do sleep 1; done; done
  out=$1
  if [ "$2" = -- ]; then
    . tools/gpu/env.sh && export PYTHONPATH=$PWD:$PYTHONPATH
    "${@:3}" || echo "stopped with $?"
  else
    tools/gpu/measure.sh "$@"
  fi
  rm -f "$out/'"$name"'.lane"
' "$home" "$out" "$@" >"$out/$name.txt" 2>&1 </dev/null &
