"""What a training step is made of: tensors (`Value`), operations (`Node`), and the list of them (`Tape`)."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .linear import matrix_layer_type


@dataclass(eq=False, slots=True)
class Value:
    """A tensor of the step, its views included: its bytes, and whether it requires a gradient."""

    bytes: int
    requires_grad: bool = False


@dataclass(frozen=True, slots=True)
class Node:
    """An operation. Its backward gives `inputs` and `parameters` their gradients.

    Attributes:
        output: what it computes.
        inputs, parameters: those that require a gradient.
        saved: what it keeps for the backward.
        forward_flops, backward_flops: of its matrix products.
        scratch: bytes that its backward needs for itself.
        is_addition: the gradient of its output is the gradient of both its inputs.
        saves_first: it saves before it computes, so a checkpoint that stops at its last saved tensor does not run it.
        inner: the operations that a checkpoint runs again.
    """

    output: Value
    inputs: Sequence[Value] = ()
    parameters: Sequence[nn.Parameter] = ()
    saved: Sequence[Value] = ()
    forward_flops: int = 0
    backward_flops: int = 0
    scratch: int = 0
    is_addition: bool = False
    saves_first: bool = False
    inner: Sequence["Node"] = ()


class Tape:
    """The operations of a step, in their order.

    Attributes:
        batch, length, tokens: the shape of the input, and batch·length.
        width: bytes of an activation, 2 or 4.
        nodes: the operations so far.
        quantized: the weights that the scheme quantises, by id.
    """

    def __init__(
        self, model: nn.Module, batch: int, length: int, width: int, quantize: bool = False, checkpointing: bool = False
    ):
        self.model = model
        self.batch = batch
        self.length = length
        self.tokens = batch * length
        self.width = width
        self.dtype = torch.float32 if width == 4 else torch.bfloat16
        self.checkpointing = checkpointing
        self.fused_attention = model.config._attn_implementation == "sdpa"
        self.nodes: list[Node] = []
        self.paths = {module: path for path, module in model.named_modules()}
        self.quantized = self._frozen_linear_weights() if quantize else {}

    def _frozen_linear_weights(self) -> dict[int, nn.Parameter]:
        """The weights that a quantised scheme stores in few bits: of frozen linear layers but the output head."""
        head = self.model.get_output_embeddings()
        layers = [layer for layer in self.paths if matrix_layer_type(layer) and layer is not head]
        weights = {id(layer.weight): layer.weight for layer in layers if not layer.weight.requires_grad}
        if not weights:
            raise ValueError("the scheme quantises frozen linear layers; there are none: use 'mixed', or a config")
        return weights

    def value(self, numbers: int, width: int | None = None) -> Value:
        """A tensor of this many numbers, each of `width` bytes (default: an activation's)."""
        return Value(numbers * (self.width if width is None else width))

    def record(
        self,
        output: Value,
        inputs: Iterable[Value] = (),
        parameters: Iterable[nn.Parameter | None] = (),
        saved: Iterable[Value] = (),
        forward_flops: int = 0,
        **rest,
    ) -> Value:
        """Append an operation; if nothing that goes in requires a gradient, it keeps nothing and has no backward."""
        inputs = [value for value in dict.fromkeys(inputs) if value.requires_grad]
        parameters = [parameter for parameter in parameters if parameter is not None and parameter.requires_grad]
        output.requires_grad = bool(inputs or parameters)
        if output.requires_grad:
            node = Node(output, inputs, parameters, list(dict.fromkeys(saved)), forward_flops, **rest)
        else:
            node = Node(output, forward_flops=forward_flops)
        self.nodes.append(node)
        return output

    def block(self, function: Callable, layer: nn.Module, x: Value) -> Value:
        """function(layer, x); checkpointed, it keeps x, and is run again up to the last thing that it keeps."""
        if not self.checkpointing:
            return function(layer, x)
        outer, self.nodes = self.nodes, []
        y = function(layer, x)
        inner, self.nodes = self.nodes, outer
        last = max(i for i, node in enumerate(inner) if not node.is_addition)
        rerun = inner[:last] if inner[last].saves_first else inner[: last + 1]
        forward = sum(node.forward_flops for node in inner)
        backward = sum(node.forward_flops for node in rerun) + sum(node.backward_flops for node in inner)
        self.nodes.append(Node(y, saved=[x], forward_flops=forward, backward_flops=backward, inner=inner))
        return y
