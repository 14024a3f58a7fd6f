#!/usr/bin/env bash
# Write constraints/ anew: cpu.txt from what is installed in .venv, gpu.txt as close to it as vllm allows.
# Called by `make lock`, on a machine without a GPU, after the tests passed with what is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python

{
    echo "# The exact versions that are tested on machines without an NVIDIA GPU: read by \`make setup\`, made by \`make lock\`."
    echo "# triton is missing on purpose: it comes with torch, where torch needs it."
    $python -m uv pip freeze --python $python --exclude-editable | grep -vE '^(pip|triton)=='
} >constraints/cpu.txt.tmp
mv constraints/cpu.txt.tmp constraints/cpu.txt

# An existing output file is what uv prefers: versions differ from cpu.txt only where they must.
grep -v '^torch==' constraints/cpu.txt >constraints/gpu.txt.tmp
echo "uv" | $python -m uv pip compile --quiet pyproject.toml - --extra serve --extra dev --no-header --no-annotate \
    --python-version 3.11 --python-platform x86_64-manylinux_2_28 --output-file constraints/gpu.txt.tmp
{
    echo "# The exact versions for machines with an NVIDIA GPU: read by \`make setup\`, made by \`make lock\`."
    cat constraints/gpu.txt.tmp
} >constraints/gpu.txt
rm constraints/gpu.txt.tmp
