#!/usr/bin/env bash
# On the GPU machine: tools/gpu/receive.sh .gpu/NAME   copies a piece under /opt/kvarn/in and checks it.
set -euo pipefail
IN=${KVARN_GPU_HOME:-/opt/kvarn}/in
mkdir -p "$IN"
cp -r "${1:?a folder that bundle.sh made}"/. "$IN/"
cd "$IN"
sha256sum -c --quiet "$(basename "$1").sha256"
echo "received: $(echo *.sha256)"
