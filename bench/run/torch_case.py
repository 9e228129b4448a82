"""PyTorch's BatchNorm at a workload; imported only where torch is asked for and installed."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from bn_fused.bench.check import EPS
from bn_fused.bench.run.cases import Case, Inputs
from bn_fused.bench.timing import Timed

ACTIVATIONS = {
    None: lambda z: z,
    "relu": functional.relu,
    "silu": functional.silu,
    "gelu": lambda z: functional.gelu(z, approximate="tanh"),
    "leaky_relu": functional.leaky_relu,
}


def torch_case(inputs: Inputs, passes: Sequence[str]) -> Case:
    """The passes of `torch.nn.functional.batch_norm` in training, channels last in memory for the layout "nhwc".

    Raises ValueError for inputs on several devices, and for an activation that torch's table does not have.
    """
    if inputs.mesh is not None:
        raise ValueError("torch runs on one device here: leave out --devices, or torch")
    workload = inputs.workload
    if workload.activation not in ACTIVATIONS:
        known = ", ".join(filter(None, ACTIVATIONS))
        raise ValueError(f"activation is {workload.activation!r}: torch is timed with {known}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, workload.dtype)
    spatial = len(workload.shape) - 2
    last = workload.layout == "nhwc" and spatial > 0

    def put(array, grad=False):
        if array is None:
            return None
        tensor = torch.from_numpy(np.array(array, np.float32)).to(device, dtype)
        # The same memory, under torch's order of axes: examples, channels, spatial sizes.
        tensor = tensor.movedim(-1, 1) if last else tensor
        return tensor.detach().requires_grad_(grad)

    weight, bias = (torch.from_numpy(array).to(device).requires_grad_() for array in (inputs.weight, inputs.bias))
    sets = [(put(inputs.x, True), put(inputs.residual, True), put(inputs.dy)) for _ in inputs.sets]
    running = [torch.zeros(workload.channels, device=device), torch.ones(workload.channels, device=device)]

    def forward(x, residual):
        z = functional.batch_norm(x, *running, weight, bias, training=True, momentum=0.01, eps=EPS)
        return ACTIVATIONS[workload.activation](z if residual is None else z + residual)

    def gradient(y, x, residual, dy, retain_graph):
        wanted = (x, weight, bias) if residual is None else (x, weight, bias, residual)
        return torch.autograd.grad(y, wanted, dy, retain_graph=retain_graph)

    def run_forward():
        with torch.no_grad():
            return [forward(x, residual) for x, residual, _ in sets]

    def run_both():
        outputs = []
        for x, residual, dy in sets:
            y = forward(x, residual)
            outputs.append((y, gradient(y, x, residual, dy, retain_graph=False)))
        return outputs

    graphs = [forward(x, residual) for x, residual, _ in sets] if "bwd" in passes else []

    def run_backward():
        return [gradient(y, *operands, retain_graph=True) for y, operands in zip(graphs, sets, strict=True)]

    def wait(outputs):
        if device == "cuda":
            torch.cuda.synchronize()

    def host(tensor):
        tensor = tensor.movedim(1, -1) if last and tensor.ndim > 1 else tensor
        return tensor.detach().float().cpu().numpy()

    def results(pass_name, outputs):
        if pass_name == "fwd":
            return {"y": host(outputs[0])}
        gradients = outputs[0] if pass_name == "bwd" else outputs[0][1]
        named = {} if pass_name == "bwd" else {"y": host(outputs[0][0])}
        names = ("dx", "dweight", "dbias", "dresidual")[: len(gradients)]
        return named | {name: host(tensor) for name, tensor in zip(names, gradients, strict=True)}

    runs = {"fwd": run_forward, "bwd": run_backward, "fwd+bwd": run_both}
    return Case({name: Timed(runs[name], len(sets), wait) for name in passes}, results)
