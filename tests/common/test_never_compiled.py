"""What is never compiled runs as it is inside a compiled function, and costs nothing to declare."""

from __future__ import annotations

import subprocess
import sys

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from common.compatibility import never_compiled


@never_compiled
def tripled(x: Tensor, compiling: list[bool]) -> Tensor:
    """3 x."""
    compiling.append(torch.compiler.is_compiling())
    return x + x + x


class Noting(nn.Module):
    @never_compiled
    @torch.no_grad()
    def noted(self, x: Tensor) -> Tensor:
        return x + 1

    def forward(self, x: Tensor, compiling: list[bool]) -> Tensor:
        return tripled(x * 2, compiling).sin() + self.noted(x)


def test_it_stays_out_of_every_graph_and_gradients_pass():
    compiled_calls: list[str] = []

    def note(graph: GraphModule, inputs: list[Tensor]) -> GraphModule:
        compiled_calls.extend(node.name for node in graph.graph.nodes if node.op.startswith("call"))
        return graph

    module, compiling = Noting(), list[bool]()
    x, same = (torch.linspace(0, 1, 5, requires_grad=True) for _ in range(2))
    compiled = torch.compile(module, backend=note)(x, compiling)
    compiled.sum().backward()
    expected = (6 * same).sin() + (same + 1).detach()
    expected.sum().backward()
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(x.grad, same.grad)
    assert compiling == [False]
    assert compiled_calls == ["mul", "sin", "add"]  # nothing of x + x + x, nor of x + 1


def test_it_is_called_by_its_own_name():
    assert (tripled.__name__, tripled.__doc__) == ("tripled", "3 x.")


def test_neither_to_declare_nor_to_call_it_imports_the_compiler():
    check = """
import sys
import torch
from stage1_vq.quantizers import NearestQuantizer, NearestQuantizerConfig
quantizer = NearestQuantizer(NearestQuantizerConfig(codebook_size=4, dim=2)).eval()
quantizer.codes(torch.zeros(1, 2, 3, 3))
print("torch._dynamo" in sys.modules)
"""
    shown = subprocess.run([sys.executable, "-c", check], check=True, capture_output=True, text=True).stdout
    assert shown == "False\n"
