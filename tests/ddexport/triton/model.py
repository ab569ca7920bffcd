"""Stands in for tritonserver's ONNX Runtime backend, which pytriton's wheel lacks: a Python-based backend of
its name, so that configurations are served as they are."""

from pathlib import Path

import numpy as np
import onnxruntime
import triton_python_backend_utils as triton


class TritonPythonModel:
    def initialize(self, args):
        graph = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(graph), options, ["CPUExecutionProvider"])

    def execute(self, requests):
        """The requests of a batch come one by one, and are drawn together."""
        feeds, wanted = {}, sorted({name for one in requests for name in one.requested_output_names()})
        for value in self.session.get_inputs():
            parts = [triton.get_input_tensor_by_name(one, value.name).as_numpy() for one in requests]
            feeds[value.name] = np.concatenate(parts)
        ends = np.cumsum([len(part) for part in parts])[:-1]
        rows = zip(*(np.split(array, ends) for array in self.session.run(wanted, feeds)), strict=True)
        return [triton.InferenceResponse(list(map(triton.Tensor, wanted, row))) for row in rows]
