#!/usr/bin/env bash
# On the GPU machine, in the repository root: tools/gpu/receive.sh .gpu/NAME [STEP...]
#
# Copies a piece under /opt/kvarn/in and checks it; then begins steps of install.sh, in the background and from a copy of
# the tree, since a call replaces the tree. Their words stand in /opt/kvarn/install-STEP.txt.
set -euo pipefail
HOME_OF_IT=${KVARN_GPU_HOME:-/opt/kvarn}
IN=$HOME_OF_IT/in
mkdir -p "$IN"
cp -r "${1:?a folder that bundle.sh made}"/. "$IN/"
(cd "$IN" && sha256sum -c --quiet "$(basename "$1").sha256" && echo "received: $(echo *.sha256)")
shift
[ $# -gt 0 ] || exit 0
mkdir -p "$HOME_OF_IT/tree-$1" && cp -r . "$HOME_OF_IT/tree-$1/"
cd "$HOME_OF_IT/tree-$1"
setsid nohup tools/gpu/install.sh "$@" >"$HOME_OF_IT/install-$1.txt" 2>&1 </dev/null &
