"""Times the ops, forward and backward, against their definitions: `kernels benchmark . --iterations 30`."""

import torch
from kernels.benchmark import Benchmark

B, N, D, H = 8, 256, 384, 6  # a block of SiT-S/2

INPUTS = {
    "norm_modulate": ((B, N, D), (B, D), (B, D)),
    "gate_residual": ((B, N, D), (B, N, D), (B, D)),
    "gate_residual_norm_modulate": ((B, N, D), (B, N, D), (B, D), (B, D), (B, D)),
    "qk_norm": ((B, N, 3, H, D // H), *[(D // H,)] * 4),
    "gelu_tanh": ((B, N, 4 * D),),
    "swiglu": ((B, N, 16 * D // 3),),
}


class TrainingBenchmark(Benchmark):
    """Every workload leaves the gradient of the op's first input in `out`."""

    seed = 0


def step(op, inputs):
    outputs = op(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return torch.autograd.grad(outputs, inputs, [torch.ones_like(output) for output in outputs])[0]


def add_workload(name, shapes):
    def setup(self):
        self.inputs = [torch.randn(shape, device=self.device, requires_grad=True) for shape in shapes]

    def run(self):
        self.out = step(getattr(self.kernel, name), self.inputs)

    def verify(self):
        return step(getattr(self.kernel.reference, name), self.inputs)

    for kind, method in {"setup": setup, "benchmark": run, "verify": verify}.items():
        setattr(TrainingBenchmark, f"{kind}_{name}", method)


for _name, _shapes in INPUTS.items():
    add_workload(_name, _shapes)
