# shellcheck shell=bash
# On the GPU machine, from the repository root: . tools/gpu/env.sh   Environment to run SGLang with the plugin.
export KVARN_GPU_HOME=${KVARN_GPU_HOME:-/opt/kvarn}
export KVARN_GPU_MODEL=$KVARN_GPU_HOME/models/qwen2.5-coder-1.5b
export KVARN_GPU_PROSE=$KVARN_GPU_HOME/in/prose.txt
export PYTHONPATH=$PWD/tools/gpu/hook:$KVARN_GPU_HOME/plugin:$KVARN_GPU_HOME/site:$KVARN_GPU_HOME/wheels
export SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK=1 # sgl_kernel 0.4.5 stands in for 0.4.10
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
export TVM_FFI_CACHE_DIR=$KVARN_GPU_HOME/cache/tvm TRITON_CACHE_DIR=$KVARN_GPU_HOME/cache/triton
