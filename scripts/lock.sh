#!/usr/bin/env bash
# Write constraints/ anew: cpu.txt from what is installed in .venv, gpu.txt as close to it as vllm allows.
# Called by `make lock`, on a machine without a GPU, after the tests passed with what is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python

# hashes FILE: write its pins with the hashes of all their files on the index. Wheels of a folder on this machine do not
# count: a hash that only they have would be refused everywhere else.
hashes() {
    $python -m uv pip compile --quiet --universal --no-deps --generate-hashes --no-header --no-annotate \
        --python-version 3.11 "$1"
}

$python -m uv pip freeze --python $python --exclude-editable | grep -vE '^(pip|torch|triton)==' >constraints/cpu.pins.tmp
{
    echo "# The exact versions that are tested on machines without an NVIDIA GPU: read by \`make setup\`, made by \`make lock\`."
    echo "# torch and triton stand elsewhere: torch's CPU build is pinned in cpu-torch.txt, without a hash, as it may come"
    echo "# from a folder of the machine that setup is told; triton comes with torch, where torch needs it."
    hashes constraints/cpu.pins.tmp
} >constraints/cpu.txt.tmp

$python -m uv pip freeze --python $python | grep '^torch==' >constraints/cpu-torch.txt

# An existing output file is what uv prefers: versions differ from cpu.txt only where they must.
cp constraints/cpu.pins.tmp constraints/gpu.pins.tmp
echo "uv" | $python -m uv pip compile --quiet pyproject.toml - --extra serve --extra dev --no-header --no-annotate \
    --python-version 3.11 --python-platform x86_64-manylinux_2_28 --output-file constraints/gpu.pins.tmp
{
    echo "# The exact versions for machines with an NVIDIA GPU: read by \`make setup\`, made by \`make lock\`."
    hashes constraints/gpu.pins.tmp
} >constraints/gpu.txt.tmp

mv constraints/cpu.txt.tmp constraints/cpu.txt
mv constraints/gpu.txt.tmp constraints/gpu.txt
rm constraints/cpu.pins.tmp constraints/gpu.pins.tmp
