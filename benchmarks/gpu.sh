#!/usr/bin/env bash
# A day with a GPU, in ten minutes: what only a GPU can show. Nothing is downloaded.
#
#   benchmarks/gpu.sh [OUT]          results as JSON in OUT (default: gpu-out); DEVICE=cuda, MODEL=FOLDER, PYTHON=python3
#   SIZE=tiny DEVICE=cpu benchmarks/gpu.sh OUT          the rehearsal, on any machine
#
# 1. distil on random Llamas of 1B and 8B shape: ours beside the reference's step, time, share of the peak, memory;
# 2. rows made on the device beside those made on the processor, float32 and bfloat16, patch and eval
#    (MODEL: the embedded model, or SmolLM2 where `make real` has fetched it).
# A part that fails does not stop the next one; the script then ends with 1.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-gpu-out}")
device=${DEVICE:-cuda}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
model=${MODEL:-$([ -d real-out/smollm2 ] && echo real-out/smollm2 || echo examples/model)}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1
mkdir -p "$out"
failed=0

# part NAME SECONDS COMMAND...: run a benchmark, with a limit of time
part() {
    local name=$1 limit=$2
    shift 2
    echo "== $name"
    timeout "$limit" "$python" "$@" --device "$device" --output "$out/$name.json" || {
        echo "gpu.sh: $name ended with $?" >&2
        failed=1
    }
}

case ${SIZE:-full} in
    tiny)
        part distill_tiny 600 benchmarks/distill_reference.py --random-model tiny --tokens 8 --snippets 4
        part rows 600 benchmarks/gpu_rows.py --model "$model" --tokens "${TOKENS:-20}" --snippets 4
        ;;
    *)
        part distill_1b 150 benchmarks/distill_reference.py --random-model 1b
        part rows 180 benchmarks/gpu_rows.py --model "$model" --tokens 500
        part distill_8b 240 benchmarks/distill_reference.py --random-model 8b --tokens 200 --snippets 12
        ;;
esac
exit $failed
