"""Stands in for tritonserver's ONNX Runtime backend, which pytriton's wheel lacks: a Python-based backend of its
name, so that the configurations are served as they are. As the real one it refuses those that do not fit."""

import json
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
        config = json.loads(args["model_config"])
        sides = {"input": self.session.get_inputs(), "output": self.session.get_outputs()}
        for side, values in sides.items():
            graphs = {value.name: value.shape[1:] or [1] for value in values}
            configured = {one["name"]: [int(size) for size in one["dims"]] for one in config[side]}
            if configured != graphs:
                raise triton.TritonModelException(f"{side}: the graph has {graphs}, not {configured}")

    def execute(self, requests):
        """Requests of a batch come one by one, and are drawn together."""
        feeds, wanted = {}, sorted({name for one in requests for name in one.requested_output_names()})
        for value in self.session.get_inputs():
            parts = [triton.get_input_tensor_by_name(one, value.name).as_numpy() for one in requests]
            feeds[value.name] = np.concatenate(parts)
        ends = np.cumsum([len(part) for part in parts])[:-1]
        columns = [np.split(values, ends) for values in self.session.run(wanted, feeds)]
        rows = zip(*columns, strict=True)
        return [triton.InferenceResponse([triton.Tensor(*pair) for pair in zip(wanted, row)]) for row in rows]
