"""The operations of a transformer's step, each a method that appends it to the tape: values in, value out.

What each of them counts, and why, is at the head of lora_ref.cost.
"""

from torch import nn

from ..functional import should_materialize
from ..layers import LoRALayer
from .linear import AdapterSize, LinearSize, adapter_flops, linear_flops, matrix_layer_type
from .tape import Node, Tape, Value


class Operations(Tape):
    """A tape with a method for each operation, or for a few as one."""

    def embedding(self, *tables: nn.Embedding, made: int = 0) -> Value:
        """The sum of rows of the tables, for the caller's tokens and `made` indices of the model's own. With
        checkpointing it requires a gradient, frozen or not: transformers and add_lora see to that."""
        for table in tables:
            if isinstance(table, LoRALayer):
                raise TypeError(f"{self.paths[table]} is a {type(table).__name__}, not counted; do not target it")
        x = self.value(self.tokens * tables[0].embedding_dim)
        self.record(x, (), [table.weight for table in tables], [self.value(made, 8)])
        if self.checkpointing and not x.requires_grad:
            x.requires_grad = True
            # What was made to require one stays alive, beside the sum where that is another tensor.
            self.nodes.append(Node(x, saved=[Value(x.bytes)] if len(tables) > 1 else []))
        return x

    def linear(self, x: Value, layer: nn.Module, rows: int | None = None) -> Value:
        """X·Wᵀ + b, X of `rows` rows (all tokens), and the adapter's s·(X·Aᵀ)·Bᵀ, as lora_linear computes it."""
        W = layer.weight
        layer_type = matrix_layer_type(layer)
        if layer_type is None or not W.is_floating_point():
            what = f"{self.paths[layer]} is a {type(layer).__name__} of {W.dtype}"
            raise TypeError(f"{what}; cost counts nn.Linear, Conv1D and add_lora's layers: pass the plain model")
        N = self.tokens if rows is None else rows
        d, k = layer_type.weight_to_matrix(W).shape
        size = LinearSize(N, d, k, x.requires_grad, W.requires_grad)
        forward, backward = linear_flops(size)
        parameters = [W, layer.bias]
        saved = [x] if W.requires_grad else []
        scratch = 0
        if id(W) in self.quantized:
            scratch += self.width * d * k  # the weight in 16 bits, for one product
        if isinstance(layer, LoRALayer):
            adapter = self._adapter(layer, N, d, k)
            more_forward, more_backward = adapter_flops(size, adapter)
            forward += more_forward
            backward += more_backward
            parameters += [layer.lora_A, layer.lora_B]
            saved += self._saved_by_adapter(x, layer.lora_dropout, size, adapter)
            if adapter.materialized:
                scratch += self.width * d * k  # W0 + s·B·A
        return self.record(
            self.value(N * d),
            [x],
            parameters,
            saved,
            forward,
            backward_flops=backward,
            scratch=scratch,
            saves_first=not isinstance(layer, LoRALayer),
        )

    def _adapter(self, layer: LoRALayer, N: int, d: int, k: int) -> AdapterSize:
        A, B = layer.lora_A, layer.lora_B
        materialized = should_materialize(N, d, k, self.dtype, layer.lora_dropout)
        return AdapterSize(len(A), A.requires_grad, B.requires_grad, materialized)

    def _saved_by_adapter(self, x: Value, dropout_p: float, size: LinearSize, adapter: AdapterSize) -> list[Value]:
        saved = []
        if adapter.A_requires_grad:
            saved.append(x)  # for ∂L/∂A = s·Zᵀ·X
        if adapter.B_requires_grad:
            saved.append(self.value(size.N * adapter.r))  # H, for ∂L/∂B = s·Gᵀ·H
        if dropout_p > 0 and (adapter.A_requires_grad or size.x_requires_grad):
            saved.append(self.value(size.N * size.k, 1))  # the mask, a byte a number
        return saved

    def add(self, x: Value, y: Value) -> Value:
        return self.record(Value(x.bytes), [x, y], is_addition=True)

    def multiply(self, x: Value, y: Value) -> Value:
        """x ⊙ y: each is kept for the other's gradient."""
        saved = []
        if x.requires_grad:
            saved.append(y)
        if y.requires_grad:
            saved.append(x)
        return self.record(Value(x.bytes), [x, y], saved=saved)

    def layer_norm(self, x: Value, norm: nn.LayerNorm) -> Value:
        """Keeps x, the mean and 1/σ."""
        mean_and_scale = self.value(2 * self.tokens, 4)
        return self.record(Value(x.bytes), [x], [norm.weight, norm.bias], [x, mean_and_scale])

    def rms_norm(self, x: Value, norm: nn.Module) -> Value:
        """w ⊙ x/rms(x), written out, in 32 bits up to w; beside ∂L/∂x three tensors of its size come and go."""
        x_in_32_bits = x if self.width == 4 else Value(2 * x.bytes)
        saved = []
        if x.requires_grad:
            saved += [x_in_32_bits, self.value(self.tokens, 4)]  # x and 1/rms
        if norm.weight.requires_grad:
            saved.append(Value(x.bytes))  # x/rms
        return self.record(Value(x.bytes), [x], [norm.weight], saved, scratch=3 * x_in_32_bits.bytes)

    def rope(self, x: Value, angles: list[Value]) -> Value:
        """x ⊙ cos + rotate_half(x) ⊙ sin; three more tensors of x's size, as above."""
        return self.record(Value(x.bytes), [x], saved=angles, scratch=3 * x.bytes)

    def activation(self, x: Value, name: str) -> Value:
        """Most keep x, or y. GPT-2's GELU is written out: it keeps x, tanh(…), x/2 and 1 + tanh(…)."""
        y = Value(x.bytes)
        saved = {"silu": [x], "gelu": [x], "gelu_pytorch_tanh": [x], "relu": [y], "tanh": [y]}
        saved["gelu_new"] = [x, Value(x.bytes), Value(x.bytes), Value(x.bytes)]
        if name not in saved:
            raise ValueError(f"the activation {name!r} is not counted; choose one of {', '.join(saved)}")
        return self.record(y, [x], saved=saved[name], scratch=x.bytes if name == "gelu_new" else 0)

    def dropout(self, x: Value, p: float, one_row_in: int = 1) -> Value:
        """D(x) with probability p, or D of one of every `one_row_in` rows of x. Keeps its mask."""
        if not p:
            return x
        numbers = x.bytes // self.width // one_row_in
        return self.record(Value(x.bytes // one_row_in), [x], saved=[self.value(numbers, 1)])

    def attention(
        self, q: Value, k: Value, v: Value, head_dim: int, dropout_p: float, softmax_in_32_bits: bool = False
    ) -> Value:
        """softmax(q·kᵀ)·v, by the fused kernel or written out (eager)."""
        rows = self.batch * self.model.config.num_attention_heads * self.length
        y = self.value(rows * head_dim)
        product = 2 * rows * self.length * head_dim  # FLOPs of q·kᵀ, and of any other product here
        joined = q.bytes if q is k else 0  # q, k and v are parts of one tensor: their gradients are put together
        if self.fused_attention:
            saved = [q, k, v, y, self.value(rows, 4)]  # the last: a log-sum-exp for each row
            backward, scratch = 5 * product, joined
        else:
            probabilities = self.value(rows * self.length, 4 if softmax_in_32_bits else None)
            saved, backward = self._eager_attention(q, k, v, y, product, dropout_p, probabilities)
            scratch = 2 * probabilities.bytes + joined
        return self.record(y, [q, k, v], (), saved, 2 * product, backward_flops=backward, scratch=scratch)

    def _eager_attention(
        self, q: Value, k: Value, v: Value, y: Value, product: int, p: float, probabilities: Value
    ) -> tuple[list[Value], int]:
        """(what it keeps, FLOPs of its backward): copies of q, k and v, the keys and values once for each query head,
        and the probabilities, as the softmax gives them and as they are multiplied by v, after the cast and dropout."""
        numbers = self.batch * self.model.config.num_attention_heads * self.length**2
        multiplied = probabilities
        if p or probabilities.bytes != self.width * numbers:
            multiplied = self.value(numbers)
        saved, backward = [], 0
        if q.requires_grad:
            saved.append(Value(y.bytes))  # k, for ∂L/∂q
            backward += product
        if k.requires_grad:
            saved.append(Value(y.bytes))  # q, for ∂L/∂k
            backward += product
        if q.requires_grad or k.requires_grad:
            saved += [Value(y.bytes), probabilities]  # v, for ∂L/∂probabilities; the softmax's own backward
            if p:
                saved.append(self.value(numbers, 1))  # the mask
            backward += product
        if v.requires_grad:
            saved.append(multiplied)
            backward += product
        return saved, backward

    def cross_entropy(self, logits: Value, shifted: int = 0) -> None:
        """The mean of −log softmax, in 32 bits, of labels of which it makes `shifted` itself. The backward holds
        ∂L/∂log-probabilities and ∂L/∂logits beside the log-probabilities."""
        in_32_bits = 4 * logits.bytes // self.width
        number_of_labels = Value(4)
        saved = [Value(in_32_bits), self.value(shifted, 8), number_of_labels]
        self.record(Value(4), [logits], (), saved, scratch=2 * in_32_bits - logits.bytes)
