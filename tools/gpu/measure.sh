#!/usr/bin/env bash
# On the GPU machine, in the repository root, after receive.sh and install.sh; KVARN_COMMIT is the commit of the tree:
#
#   tools/gpu/measure.sh OUT [tests] [kernels] [compare] [hits] [verify] [speculate] [parallel] [serving] [quality]
#
# Default: the first three.
#
# tests: kernels against the references; kernels: writing, prefill and decode; compare: SGLang, or vLLM if
# KVARN_GPU_ENGINE=vllm, with and without tiles; hits: first tokens after prefix hits, with nothing beside, since they wait
# for the host; verify and speculate: drafts, alone and in the engine (after install.sh draft); parallel: two GPUs beside
# one, and PARALLEL_STEPS steps of both; serving: `kvarn bench serve` of SHAPE with WORKLOADS, beside PEERS, in SERVER_SHARE
# of the memory, with SERVER_FLAGS more; quality: quality.sh with its steps QUALITY. Every step stops after STEP_SECONDS;
# parallel, speculate and quality go on where they were. Writes OUT/*-h100.json, serving-*.json, tp2-*.json and logs; copy
# the results to benchmarks/results afterwards, under the name of the GPU that they tell.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${1:?a folder for the results}
shift
: "${KVARN_COMMIT:?results name the commit that they come from}"
. tools/gpu/env.sh
export PYTHONPATH=$PWD:$PYTHONPATH KVARN_BENCH_LOGS=$out/logs
engine=${KVARN_GPU_ENGINE:-sglang}
mkdir -p "$out/logs"

# Loads follow the capacity, and shares of a larger memory would make them last longer.
gib=$(($(nvidia-smi --id=0 --query-gpu=memory.total --format=csv,noheader,nounits) / 1024))
share=$([ "$gib" -gt 100 ] && echo 0.47 || echo 0.8)
server_share=${SERVER_SHARE:-$([ "$gib" -gt 100 ] && echo 0.5 || echo 0.85)}

if [ "$engine" = sglang ]; then
  arguments='{"sampling_backend":"pytorch","mem_fraction_static":'$share',"cuda_graph_max_bs_decode":64}'
  # FlashAttention 3 is not part of the first pieces.
  backend=$([ -e "$KVARN_GPU_HOME/fa3.done" ] && echo fa3 || echo triton)
  baseline='{"attention_backend":"'$backend'"}'
  dtypes=(kvarn_k4v2_g128)
  peers=fp8_e4m3
  server=(--mem-fraction-static "$server_share" --max-running-requests 64 --sampling-backend pytorch)
  unbounded=$arguments
else
  arguments='{"max_model_len":40960,"gpu_memory_utilization":'$share'}'
  unbounded='{"gpu_memory_utilization":'$share'}'
  baseline='{}'
  dtypes=(kvarn_k4v2_g128 turboquant_4bit_nc)
  peers=fp8,turboquant_4bit_nc
  server=(--gpu-memory-utilization "$server_share" --max-num-seqs 64)
fi

with() { echo "${1%\}},$2}"; } # JSON with more in it; what comes last counts
limited() { timeout -s TERM "${STEP_SECONDS:-560}" "$@"; }
benchmark() { limited python3 -m benchmarks.kernels "$1" --out "$out/$1-h100.json" "${@:2}"; }

tests() { limited python3 -m pytest -p no:cacheprovider -n 10 -q -rf tests/kernels -k 'not triton'; }

kernels() {
  benchmark write
  benchmark extend
  benchmark mla
  benchmark decode --peers ${PEERS-sdpa}
}

compare() {
  limited python3 -m benchmarks.serving.compare --engine "$engine" --model "$KVARN_GPU_MODEL" --text "$KVARN_GPU_PROSE" \
    --dtypes "${dtypes[@]}" --out "$out/$engine-h100.json" --arguments "$arguments" --baseline-arguments "$baseline"
}

hits() { # both engines are on the GPU at the same time
  local part='"gpu_memory_utilization":0.4'
  [ "$engine" = vllm ] || part='"mem_fraction_static":0.4,"max_total_tokens":65536'
  limited python3 -m benchmarks.serving.hits --engine "$engine" --model "$KVARN_GPU_MODEL" \
    --text "$KVARN_GPU_HOME/in/prose-long.txt" --out "$out/hits-$engine-h100.json" \
    --arguments "$(with "$arguments" "$part")" --baseline-arguments "$baseline"
}

verify() {
  limited python3 -m benchmarks.kernels decode --only '1x64k/gqa(4|8)/q4|16x16k/gqa(4|8)/q4' --peers --out "$out/verify.json"
}

speculate() { # over contexts longer than the models were trained for; SGLang without prefill graphs, for a quicker start;
  # 8-bit floats beside a bfloat16 model, since neither engine verifies drafts over them in float16
  local started=$unbounded
  [ "$engine" = vllm ] || started=$(with "$unbounded" '"disable_prefill_cuda_graph":true')
  python3 tools/gpu/longer.py "$KVARN_GPU_MODEL" "$KVARN_GPU_MODEL-yarn" 4
  python3 tools/gpu/longer.py "$KVARN_GPU_DRAFT" "$KVARN_GPU_DRAFT-yarn" 4
  limited python3 -m benchmarks.serving.speculate --engine "$engine" --model "$KVARN_GPU_MODEL-yarn" \
    --draft "$KVARN_GPU_DRAFT-yarn" --drafts 3 --text "$KVARN_GPU_HOME/in/prose-long.txt" --arguments "$started" \
    --other-arguments "$baseline" --peer-arguments '{"dtype":"bfloat16"}' \
    --mismatches "${MISMATCHES-0}" --work "$out/speculate-$engine" \
    --kernels "$out/verify.json" --contexts ${CONTEXTS-32768 114688} --out "$out/spec-$engine-h100.json"
}

parallel() { # SGLang's own all-reduce takes multicast memory where it can, which a host that is shared doesn't allow
  limited python3 -m benchmarks.serving.parallel --engine "$engine" --model "$KVARN_GPU_MODEL" --text "$KVARN_GPU_PROSE" \
    --arguments "$(with "$unbounded" '"disable_custom_all_reduce":true')" --baseline-arguments "$baseline" \
    --steps "${PARALLEL_STEPS:-10000}" --work "$out/parallel" --out "$out/tp2-$engine.json"
}

quality() { # shellcheck disable=SC2086
  limited tools/gpu/quality.sh "$out" ${QUALITY-}
}

serving() {
  local shape=${SHAPE:-qwen3-8b} others=${PEERS-$peers} more=()
  read -ra more <<<"${SERVER_FLAGS-}"
  limited python3 -m kvarn bench serve --engine "$engine" --shape "$shape" --tokenizer "${TOKENIZER:-$KVARN_GPU_MODEL}" \
    --dtypes "kvarn_k4v2_g128${others:+,$others}" --workload "${WORKLOADS:-burst,slope}" \
    --out "$out/serving-$engine-$shape.json" --logs "$out/logs" -- "${server[@]}" ${more+"${more[@]}"}
}

[ $# -gt 0 ] || set -- tests kernels compare
for step in "$@"; do
  began=$SECONDS
  "$step" || echo "$step: stopped with $?"
  echo "$step: $((SECONDS - began)) s"
done
