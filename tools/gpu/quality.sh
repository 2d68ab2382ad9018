#!/usr/bin/env bash
# On the GPU machine, in the repository root, after receive.sh of .gpu/engine and .gpu/tasks, and install.sh:
#
#   tools/gpu/quality.sh OUT [texts] [long] [turns] [tasks] [twobits] [layers]      default: the first four
#
# texts: all methods on 4,096 tokens of prose and code; long: some on 32,768; turns: conversations; tasks: HumanEval,
# GSM8K and needles with SGLang, or with vLLM if KVARN_GPU_ENGINE=vllm, for TASK_DTYPES; twobits: variants of 2-bit keys;
# layers: presets chosen layer by layer. Writes OUT/{quality,tasks,twobits,layers}-gpu.json, going on with the rows that
# stand in benchmarks/results; copy them there afterwards.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${1:?a folder for the results}
shift
. tools/gpu/env.sh
export PYTHONPATH=$PWD:$PYTHONPATH
engine=${KVARN_GPU_ENGINE:-sglang}
model=$KVARN_GPU_HOME/models/Qwen2.5-Coder-1.5B-Instruct
long_prose=$KVARN_GPU_HOME/in/prose-long.txt
main_methods=(kvarn_k4v2_g128 kvarn_k4v4_g128 kvarn_k2v2_g128 hadamard-rtn-k4v2 published-k4v2 fp8-e4m3)
ln -sfn "$KVARN_GPU_MODEL" "$model" # results call a model by its folder's name
mkdir -p "$out"
for name in {quality,tasks,twobits,layers}-gpu.json; do
  if [ ! -e "$out/$name" ] && [ -e "benchmarks/results/$name" ]; then cp "benchmarks/results/$name" "$out/"; fi
done

evaluate() { python3 -m kvarn eval "$model" "$@" --device cuda --out "$out/${results:-quality}-gpu.json"; }

texts() {
  evaluate kvarn_k4v2_g128 kvarn_k4v4_g128 --text "$KVARN_GPU_PROSE" --tokens 4096 --generate 256
  evaluate all ablation --text "$KVARN_GPU_PROSE" --tokens 4096
  evaluate all --text code --tokens 4096
}

long() {
  evaluate "${main_methods[@]}" --text "$long_prose" --tokens 32768
  evaluate "${main_methods[@]}" --text code --tokens 32768
}

turns() {
  evaluate "${main_methods[@]}" --text humaneval --tokens 16384
  evaluate "${main_methods[@]}" --text agent-8192 --tokens 8000
  evaluate "${main_methods[@]}" --text agent-32768 --tokens 30000
}

tasks() {
  local arguments='{}' baseline='{}'
  if [ "$engine" = sglang ]; then
    arguments='{"sampling_backend":"pytorch","mem_fraction_static":0.7,"cuda_graph_max_bs_decode":64}'
    baseline='{"attention_backend":"'$([ -e "$KVARN_GPU_HOME/fa3.done" ] && echo fa3 || echo triton)'"}'
  fi
  python3 -m benchmarks.quality humaneval gsm8k needles --engine "$engine" --model "$model" --haystack "$long_prose" \
    --dtypes ${TASK_DTYPES:-kvarn_k4v2_g128 kvarn_k4v4_g128 kvarn_k2v2_g128} --out "$out/tasks-gpu.json" \
    --arguments "$arguments" --baseline-arguments "$baseline"
}

twobits() {
  results=twobits evaluate k2v2: k2v2:key_clip=0.{7,75,85,9} k2v2:key_order={0,1,8,16,32} k2v2:value_clip=0.{7,75,85} \
    k2v2:key_refit=1 --text "$KVARN_GPU_PROSE" --tokens 4096
}

layers() {
  python3 -m benchmarks.quality.layers --model "$model" --text "$KVARN_GPU_PROSE" --tokens 4096 --dtype float16 \
    --device cuda --out "$out/layers-gpu.json"
}

[ $# -gt 0 ] || set -- texts long turns tasks
for step in "$@"; do
  began=$SECONDS
  "$step"
  echo "$step: $((SECONDS - began)) s"
done
