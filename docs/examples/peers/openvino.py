"""OpenVINO: the operator BatchNormInference, compiled for the CPU."""

PEERS = {"openvino": "OpenVINO, BatchNormInference"}
KNOWN = {
    "openvino": {
        "Inference is x·scale + shift": "inference_by_running_statistics",
    },
}
"""What is wrong, and the checks that fail by it."""


def peer(name):
    import openvino
    from openvino import opset8 as ops

    core = openvino.Core()

    def function(x, gamma, beta, mean, var, *, training, momentum, eps):
        given = (x, gamma, beta, mean, var)
        data = ops.parameter(list(x.shape), x.dtype)
        vectors = [ops.constant(v) for v in given[1:]]
        y = ops.batch_norm_inference(data, *vectors, eps)
        # Without this, some processors compute in bfloat16.
        settings = {"INFERENCE_PRECISION_HINT": "f32"}
        model = core.compile_model(openvino.Model([y], [data]), "CPU", settings)
        return model(x)[0].copy(), mean, var

    return {
        "function": function,
        "features": ["inference", "large"],
        "versions": {"openvino": openvino.__version__},
    }
