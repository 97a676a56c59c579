"""ONNX Runtime: the operator BatchNormalization, for inference and with training_mode=1."""

import numpy as np

PEERS = {
    "onnxruntime-inference": "ONNX Runtime, BatchNormalization",
    "onnxruntime-training": "ONNX Runtime, BatchNormalization(training_mode=1)",
}
KNOWN = {
    "onnxruntime-inference": {
        "Inference is x·scale + shift": "inference_by_running_statistics",
    },
    "onnxruntime-training": {
        "The mean is one float32": "y_at_mean y_of_many_values",
        "Squares beyond the range of float32": "y_of_large_numbers",
        "An empty batch poisons the running mean": "empty_batch",
    },
}
"""What is wrong, and the checks that fail by it."""


def peer(name):
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    in_training = name == "onnxruntime-training"

    def function(x, gamma, beta, mean, var, *, training, momentum, eps):
        inputs = {"x": x, "scale": gamma, "bias": beta, "mean": mean, "var": var}
        outputs = ["y", "new_mean", "new_var"] if in_training else ["y"]
        node = helper.make_node(
            "BatchNormalization",
            list(inputs),
            outputs,
            epsilon=eps,
            **({"training_mode": 1, "momentum": 1 - momentum} if in_training else {}),
        )
        graph = helper.make_graph(
            [node],
            "norm",
            [value(name, v) for name, v in inputs.items()],
            [value(name, v) for name, v in zip(outputs, (x, mean, var), strict=False)],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=10)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        found = session.run(None, inputs)
        return (*found, mean, var)[:3] if not in_training else tuple(found)

    def value(name, v):
        kind = {"float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE}.get(v.dtype.name)
        kind = TensorProto.FLOAT16 if v.dtype == np.float16 else kind
        return helper.make_tensor_value_info(name, kind, v.shape)

    return {
        "function": function,
        "correction": 0,
        "features": [*(["training", "running"] if in_training else ["inference"]), "large"],
        "versions": {"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__},
    }
