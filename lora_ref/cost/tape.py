"""The operations of a training step, their FLOPs and what they keep (`Tape`), and the bytes alive in its backward.

What each line counts, and why, is at the head of cost.py.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from ..functional import should_materialize
from ..layers import LoRAConv1D, LoRALayer, LoRALinear
from ..matching import lora_layer_class


@dataclass(eq=False, slots=True)
class Value:
    """A tensor of the step, its views included: its bytes, and whether it wants a gradient."""

    bytes: int
    grad: bool = False


class Node(NamedTuple):
    """An operation. Its backward gives `inputs` and `parameters` their gradients, from `saved`, with `scratch` bytes
    beside. `adds`: an addition, whose gradient is both inputs'. `early`: it keeps first and computes then.
    `inner`: what a checkpoint runs again. `forward`, `backward`: FLOPs."""

    output: Value
    inputs: list[Value] = []
    parameters: list[nn.Parameter] = []
    saved: list[Value] = []
    forward: int = 0
    backward: int = 0
    scratch: int = 0
    adds: bool = False
    early: bool = False
    inner: list["Node"] = []


class Tape:
    """The operations of a step, in their order. Each method appends one, or a few as one: values in, value out."""

    def __init__(self, model: nn.Module, batch: int, length: int, width: int, quantise: bool, checkpointing: bool):
        self.batch, self.length, self.tokens = batch, length, batch * length
        self.width, self.checkpointing = width, checkpointing
        self.dtype = torch.float32 if self.width == 4 else torch.bfloat16
        self.model, self.fused = model, model.config._attn_implementation == "sdpa"
        self.nodes: list[Node] = []
        self.paths = {module: path for path, module in model.named_modules()}
        self.quantised = {}
        if quantise:
            layers = [layer for layer in self.paths if _kind(layer) and layer is not model.get_output_embeddings()]
            self.quantised = {id(layer.weight): layer.weight for layer in layers if not layer.weight.requires_grad}
            if not self.quantised:
                raise ValueError("the scheme quantises frozen linear layers; there are none: use 'mixed', or a config")

    def value(self, numbers: int, width: int | None = None) -> Value:
        return Value(numbers * (self.width if width is None else width))

    def record(self, output: Value, inputs=(), parameters=(), saved=(), forward=0, backward=0, **rest) -> Value:
        """Append an operation; if nothing that goes in wants a gradient, it keeps nothing and has no backward."""
        inputs = [value for value in dict.fromkeys(inputs) if value.grad]
        parameters = [parameter for parameter in parameters if parameter is not None and parameter.requires_grad]
        output.grad = bool(inputs or parameters)
        node = Node(output, forward=forward)
        if output.grad:
            node = Node(output, inputs, parameters, list(dict.fromkeys(saved)), forward, backward, **rest)
        self.nodes.append(node)
        return output

    def block(self, function: Callable, layer: nn.Module, x: Value) -> Value:
        """function(layer, x); checkpointed, it keeps x, and is run again up to the last thing that it keeps."""
        if not self.checkpointing:
            return function(layer, x)
        outer, self.nodes = self.nodes, []
        y = function(layer, x)
        inner, self.nodes = self.nodes, outer
        last = max(i for i, node in enumerate(inner) if not node.adds)
        again = sum(node.forward for node in inner[: last + (not inner[last].early)])
        forward, backward = sum(node.forward for node in inner), sum(node.backward for node in inner)
        self.nodes.append(Node(y, saved=[x], forward=forward, backward=again + backward, inner=inner))
        return y

    def embedding(self, *tables: nn.Embedding, made: int = 0) -> Value:
        """The sum of rows of the tables, for the caller's tokens and `made` indices of the model's own. With
        checkpointing it wants a gradient, frozen or not: transformers and add_lora see to that."""
        for table in tables:
            if isinstance(table, LoRALayer):
                raise TypeError(f"{self.paths[table]} is a {type(table).__name__}, not counted; do not target it")
        x, weights = self.value(self.tokens * tables[0].embedding_dim), [table.weight for table in tables]
        self.record(x, (), weights, [self.value(made, 8)])
        if self.checkpointing and not x.grad:  # what was made to want one stays, beside the sum where that is another
            x.grad = True
            self.nodes.append(Node(x, saved=[Value(x.bytes)] * (len(tables) > 1)))
        return x

    def linear(self, x: Value, layer: nn.Module, rows: int | None = None) -> Value:
        """X·Wᵀ + b, plus the adapter's s·(X·Aᵀ)·Bᵀ with all that lora_linear does for it."""
        kind, W, N = _kind(layer), layer.weight, rows or self.tokens
        if kind is None or not W.is_floating_point():
            what = f"{self.paths[layer]} is a {type(layer).__name__} of {W.dtype}"
            raise TypeError(f"{what}; cost knows nn.Linear, Conv1D and add_lora's layers: pass the plain model")
        d, k = kind.weight_to_matrix(W).shape
        forward, backward = 2 * N * d * k, 2 * N * d * k * (x.grad + W.requires_grad)
        parameters, saved, scratch = [W, layer.bias], [x] * W.requires_grad, 0
        if isinstance(layer, LoRALayer):
            A, B, p = layer.lora_A, layer.lora_B, layer.lora_dropout
            r, a, b = len(A), A.requires_grad, B.requires_grad
            formed = should_materialize(
                N, d, k, self.dtype, p
            )  # W0 + s·B·A, at 2dkr, instead of the products with A and B
            forward += 2 * d * k * r + 2 * N * k * r * b if formed else 2 * N * r * (d + k)
            backward += 2 * N * d * r * (x.grad or a) + (2 * d * k * r if formed else 2 * N * k * r) * x.grad
            backward += 2 * N * k * r * a + 2 * N * d * r * b
            parameters, scratch = parameters + [A, B], self.width * d * k * formed
            saved = saved + [x] * a + [self.value(N * r)] * b + [self.value(N * k, 1)] * (p > 0 and (a or x.grad))
        scratch += self.width * d * k * (id(W) in self.quantised)  # the weight in 16 bits, for one product
        early, y = not isinstance(layer, LoRALayer), self.value(N * d)
        return self.record(y, [x], parameters, saved, forward, backward, scratch=scratch, early=early)

    def add(self, x: Value, y: Value) -> Value:
        return self.record(Value(x.bytes), [x, y], adds=True)

    def multiply(self, x: Value, y: Value) -> Value:
        return self.record(Value(x.bytes), [x, y], saved=[y] * x.grad + [x] * y.grad)

    def layer_norm(self, x: Value, norm: nn.LayerNorm) -> Value:
        return self.record(Value(x.bytes), [x], [norm.weight, norm.bias], [x, self.value(2 * self.tokens, 4)])

    def rms_norm(self, x: Value, norm: nn.Module) -> Value:
        """w ⊙ x/rms(x), written out, in 32 bits up to w; beside ∂L/∂x three tensors of its size come and go."""
        wide = x if self.width == 4 else Value(2 * x.bytes)
        saved = [wide, self.value(self.tokens, 4)] * x.grad + [Value(x.bytes)] * norm.weight.requires_grad
        return self.record(Value(x.bytes), [x], [norm.weight], saved, scratch=3 * wide.bytes)

    def rope(self, x: Value, angles: list[Value]) -> Value:
        """x ⊙ cos + rotate_half(x) ⊙ sin; three more tensors of x's size, as above."""
        return self.record(Value(x.bytes), [x], saved=angles, scratch=3 * x.bytes)

    def activation(self, x: Value, name: str) -> Value:
        """Most keep x, or y. GPT-2's GELU is written out: it keeps x, tanh(…), x/2 and 1 + tanh(…)."""
        y = Value(x.bytes)
        kept = {"silu": [x], "gelu": [x], "gelu_pytorch_tanh": [x], "relu": [y], "tanh": [y]}
        kept["gelu_new"] = [x] + [Value(x.bytes) for _ in range(3)]
        if name not in kept:
            raise ValueError(f"the activation {name!r} is not counted; choose one of {', '.join(kept)}")
        return self.record(y, [x], saved=kept[name], scratch=x.bytes * (name == "gelu_new"))

    def dropout(self, x: Value, p: float, share: int = 1) -> Value:
        """D(x), or of one in `share` rows of x. Keeps its mask."""
        mask = self.value(x.bytes // self.width // share, 1)
        return self.record(Value(x.bytes // share), [x], saved=[mask]) if p else x

    def attention(self, q: Value, k: Value, v: Value, dim: int, p: float, wide: bool = False) -> Value:
        """softmax(q·kᵀ)·v. Fused it keeps q, k, v, y and a log-sum-exp for each row; eager, copies of q, k and v, the
        keys and values once for each query head, and the probabilities, in 32 bits if `wide`, dropped and not."""
        rows = self.batch * self.model.config.num_attention_heads * self.length
        y, product, scores = self.value(rows * dim), 2 * rows * self.length * dim, q.grad or k.grad
        joined = q.bytes * (q is k)  # q, k and v are parts of one tensor: their gradients are put together
        if self.fused:
            saved = [q, k, v, y, self.value(rows, 4)]
            return self.record(y, [q, k, v], (), saved, 2 * product, 5 * product, scratch=joined)
        softmax = self.value(rows * self.length, 4 if wide else None)
        dropped = self.value(rows * self.length) if p or softmax.bytes != self.width * rows * self.length else softmax
        copies = [Value(y.bytes) for wanted in (q.grad, k.grad, scores) if wanted]
        mask = [self.value(rows * self.length, 1)] * (p > 0)
        saved = copies + ([softmax] + mask) * scores + [dropped] * v.grad
        backward = (scores + v.grad + q.grad + k.grad) * product
        return self.record(y, [q, k, v], (), saved, 2 * product, backward, scratch=2 * softmax.bytes + joined)

    def cross_entropy(self, logits: Value, shifted: int = 0) -> None:
        """The mean of −log softmax, in 32 bits, of labels of which it makes `shifted` itself. The backward holds
        ∂L/∂log-probabilities and ∂L/∂logits beside the log-probabilities."""
        wide = 4 * logits.bytes // self.width
        saved = [Value(wide), self.value(shifted, 8), Value(4)]  # the last: how many labels there are
        self.record(Value(4), [logits], (), saved, scratch=2 * wide - logits.bytes)


def _kind(layer: nn.Module) -> type[LoRALayer] | None:
    """LoRALinear or LoRAConv1D, which say how the weight of a linear layer, adapted or not, is a matrix (d, k)."""
    kind = type(layer) if isinstance(layer, LoRALayer) else lora_layer_class(layer)
    return kind if kind in (LoRALinear, LoRAConv1D) else None


class Memory:
    """Bytes alive during the backward: what is kept, each value once, and gradients, `width` bytes a parameter."""

    def __init__(self, width: int):
        self.width, self.live, self.peak = width, 0, 0
        self.users, self.gradients, self.trained = Counter(), {}, set()

    def keep(self, nodes: list[Node]) -> "Memory":
        for value in (value for node in nodes for value in node.saved):
            self.live += value.bytes * (self.users[value] == 0)
            self.users[value] += 1
        return self

    def backward(self, nodes: list[Node]) -> "Memory":
        """Each node in turn: the gradients of its inputs come; then that of its output goes, and what it kept."""
        for node in reversed(nodes):
            if node.inner:
                self.keep(node.inner).backward(node.inner)
            elif node.output.grad:
                self._step(node)
            for value in node.saved:
                self.users[value] -= 1
                self.live -= value.bytes * (self.users[value] == 0)
        return self

    def _step(self, node: Node) -> None:
        held = self.gradients.pop(node.output, 0)
        if node.adds:  # one tensor is the gradient of both
            self.gradients |= {value: held * (i == 0) for i, value in enumerate(node.inputs)}
            return
        new = sum(value.bytes for value in node.inputs) + sum(p.numel() for p in node.parameters) * self.width
        tied = sum(p.numel() for p in node.parameters if p in self.trained) * self.width  # added up in a third tensor
        self.peak = max(self.peak, self.live + new + tied + node.scratch)
        self.live += new - tied - held - sum(self.gradients.get(value, 0) for value in node.inputs)
        self.gradients |= {value: value.bytes for value in node.inputs}
        self.trained.update(node.parameters)
