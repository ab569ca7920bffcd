#!/usr/bin/env bash
# Parity and times on an NVIDIA GPU, in less than 8 minutes. Prints every measurement, and one table at the end; OUT gets them as JSON.
#
#   tests/gpu/bench.sh BUNDLES [OUT] [PARTS]     default: build/gpu-bench, and all parts
#
# Needs a Python (PYTHON, default python3) with PyTorch for CUDA, onnx, and what ddexport imports; onnxruntime-gpu may lie
# in a folder on PYTHONPATH, and onnxruntime must not be installed beside it. BUNDLES is made on any machine by
#
#   for model in digits-var digits-llamagen; do
#       ddexport onnx $model --precision fp32,fp16 -o BUNDLES/$model && ddexport validate parity BUNDLES/$model
#   done
#   ddexport onnx var-d16 --precision fp32,fp16 --random-weights 0 -o build/var-d16
#   python tests/gpu/bench.py prepare build/var-d16 BUNDLES/var-d16       # 4 MB in place of 2.4 GB
#
# PARTS: peak,parity,onnxruntime,pytorch,pipelines,tensorrt (TensorRT-RTX, if it loads). Without a GPU everything runs on the CPU, with smaller batches.
# MODEL=llamagen-l measures that one in place of var-d16.
set -euo pipefail
repository=$(cd "$(dirname "$0")/../.." && pwd)
bundles=${1:?tests/gpu/bench.sh BUNDLES [OUT] [PARTS]} out=${2:-build/gpu-bench}
parts=${3:-peak,parity,onnxruntime,pytorch,pipelines,tensorrt}
python=${PYTHON:-python3}
mkdir -p "$out"
# CUDA and cuDNN of PyTorch's packages, for ONNX Runtime.
libraries=$("$python" -c 'import glob, site; print(":".join(p for s in site.getsitepackages() for p in glob.glob(s + "/nvidia/*/lib")))')
export LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
exec "$python" "$(dirname "$0")/bench.py" "$parts" "$bundles" "$out"
