#!/usr/bin/env bash
# Proves on a machine with an NVIDIA GPU (Linux, Python 3.10 to 3.13, pip) that engines run and are right, and
# leaves a log and doctor's answers in OUT.
#
#   tests/gpu/run_all.sh [OUT]             default: build/gpu
#
#   PYTHON=python3.12    the Python to use                                  default: python3
#   WHEELS=DIR           install from a folder of wheels alone              default: from the index that pip uses
#   NO_INSTALL=1         use PYTHON as it is, with everything installed
#   BACKEND=tensorrt-rtx build with this package                             default: the one made for the GPU
#   REAL=1               also var-d16 at real size, with random weights: minutes, 10 GB
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-build/gpu}
mkdir -p "$out"
exec > >(tee "$out/log.txt") 2>&1
python=${PYTHON:-python3}

step() { printf '\n== %s\n' "$*"; }

step "GPU"
nvidia-smi --query-gpu=name,compute_cap,memory.total,driver_version --format=csv,noheader
# TensorRT-RTX has engines for 7.5, 8.0, 8.6, 8.9, 12.0 and 12.1; data-centre GPUs of 9 and 10 need full TensorRT.
case $(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1) in
    7.5 | 8.0 | 8.6 | 8.9 | 12.*) backend=tensorrt-rtx ;;
    *) backend=tensorrt ;;
esac
backend=${BACKEND:-$backend}
export DDEXPORT_GPU_BACKEND=$backend
echo "engines by $backend"

if [ -z "${NO_INSTALL:-}" ]; then
    step "installing into $out/venv"
    "$python" -m venv "$out/venv"
    python=$PWD/$out/venv/bin/python
    [[ $out = /* ]] && python=$out/venv/bin/python
    from=()
    [ -n "${WHEELS:-}" ] && from=(--no-index --find-links "$WHEELS")
    "$python" -m pip install -q --disable-pip-version-check -c constraints.txt "${from[@]}" -e ".[export,validate,$backend]" pytest
    # The two packages of ONNX Runtime share one module: the one for the CPU must go first.
    "$python" -m pip uninstall -q -y onnxruntime
    "$python" -m pip install -q --disable-pip-version-check "${from[@]}" "onnxruntime-gpu[cuda,cudnn]"
fi
ddexport() { "$python" -c 'import sys; from ddexport.cli import main; sys.argv[0] = "ddexport"; sys.exit(main())' "$@"; }

step "doctor"
ddexport doctor
ddexport doctor --json >"$out/doctor.json"

step "tests"
"$python" -m pytest -m gpu tests/gpu -p no:cacheprovider --durations=10

step "both embedded models"
for model in digits-var digits-llamagen; do
    ddexport onnx --model "$model" --precision fp32,fp16,bf16 -o "$out/$model" --force
    ddexport trt "$out/$model" --backend "$backend" --precision fp32,fp16,bf16 --batch 1,4,8
    ddexport doctor "$out/$model"
    ddexport sample "$out/$model" --backend tensorrt --precision fp16 -n 8 -o "$out/$model.png"
    for precision in fp32 fp16 bf16; do
        ddexport validate parity "$out/$model" --backend tensorrt --precision "$precision" --images 200
    done
done

if [ -n "${REAL:-}" ]; then
    step "var-d16 at real size, random weights"
    ddexport onnx --model var-d16 --random-weights 0 --precision fp32,fp16 -o "$out/var-d16" --force
    ddexport trt "$out/var-d16" --backend "$backend" --precision fp16 --batch 1,4,8
    ddexport doctor "$out/var-d16"
    ddexport sample "$out/var-d16" --backend tensorrt --precision fp16 -n 16 -o "$out/var-d16/"
    ddexport validate parity "$out/var-d16" --backend tensorrt --precision fp16 --images 8
fi
echo "all good: log, pictures and reports are in $out"
