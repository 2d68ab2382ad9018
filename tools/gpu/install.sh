#!/usr/bin/env bash
# On the GPU machine, in the repository root: tools/gpu/install.sh [engine] [vllm] [model] [draft] [fa3] [plugin]
# Default: all but draft. plugin installs this repository each time, the others once, from the pieces received. No network.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. tools/gpu/env.sh
pieces=$KVARN_GPU_HOME/in

# Engines import some thousand modules in each of their processes; a few that aren't for this Python don't matter.
compiled() { python3 -m compileall -q -j 0 "$@" >/dev/null 2>&1 || true; }

engine() {
  tar xJf "$pieces/site.txz" -C "$KVARN_GPU_HOME" & # SGLang and sgl_kernel, into site/
  python3 -m pip install -q --no-index --no-deps --no-compile --target "$KVARN_GPU_HOME/wheels" "$pieces"/whl/*.whl
  wait $!
  compiled "$KVARN_GPU_HOME"/{site,wheels}
}

fa3() { cat "$pieces"/fa3.zip.? >"$pieces/fa3.zip" && python3 -m zipfile -e "$pieces/fa3.zip" "$KVARN_GPU_HOME/site"; }

vllm() { # into a folder of its own: SGLang wants other versions of the same packages
  local home=$KVARN_GPU_HOME/vllm
  mkdir -p "$home"
  tar xJf "$pieces/vllm-site.txz" -C "$home"
  cat "$pieces"/vllm-c.so.xz.? | xz -dc >"$home/site/vllm/_C_stable_libtorch.abi3.so" &
  local c=$!
  xz -dc "$pieces/vllm-moe.so.xz" >"$home/site/vllm/_moe_C_stable_libtorch.abi3.so" &
  local moe=$!
  tar xJf "$pieces/vllm-flashmla.txz" -C "$home/site"
  xz -dc "$pieces/vllm-fa3.so.xz" >"$home/site/vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so"
  cat "$pieces"/vllm-fa2.so.xz.? | xz -dc >"$home/site/vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so"
  python3 -m pip install -q --no-index --no-deps --no-compile --target "$home/wheels" "$pieces"/vllm-whl/*.whl
  wait $c && wait $moe
  compiled "$home"/{site,wheels}
}

model() { python3 tools/gpu/convert.py "$pieces" "$KVARN_GPU_MODEL"; }

draft() { python3 tools/gpu/convert.py "$pieces" "$KVARN_GPU_DRAFT" --model draft; }

plugin() { # a copy with its metadata: SGLang finds the plugin by the entry points named there
  rm -rf "$KVARN_GPU_HOME/plugin" build ./*.egg-info
  python3 -m pip install -q --no-index --no-deps --no-build-isolation --no-compile --target "$KVARN_GPU_HOME/plugin" .
  python3 -c 'from importlib.metadata import entry_points as e
for group in "sglang.srt.plugins", "vllm.general_plugins": print(*e(group=group))'
}

[ $# -gt 0 ] || set -- engine vllm model fa3 plugin
for step in "$@"; do
  if [ -e "$KVARN_GPU_HOME/$step.done" ]; then continue; fi
  began=$SECONDS
  "$step"
  echo "$step installed, $((SECONDS - began)) s"
  if [ "$step" != plugin ]; then touch "$KVARN_GPU_HOME/$step.done"; fi
done
