"""The bytes alive during the backward of a step, and the most there are at any moment (`Memory`)."""

from collections import Counter
from collections.abc import Sequence

from torch import nn

from .tape import Node, Value


class Memory:
    """Bytes alive: values kept for the backward, each counted once, and gradients.

    Attributes:
        live: bytes at this moment.
        peak: the most so far.
    """

    def __init__(self, gradient_width: int):
        """`gradient_width`: bytes of one number of a parameter's gradient."""
        self.gradient_width = gradient_width
        self.live = 0
        self.peak = 0
        self._users: Counter[Value] = Counter()  # operations whose backward still needs this value
        self._gradients: dict[Value, int] = {}  # bytes of ∂L/∂value, where it is alive
        self._trained: set[nn.Parameter] = set()  # parameters that have their gradient

    def keep(self, nodes: Sequence[Node]) -> None:
        """What these operations keep in their forward comes to life."""
        for node in nodes:
            for value in node.saved:
                if self._users[value] == 0:
                    self.live += value.bytes
                self._users[value] += 1

    def backward(self, nodes: Sequence[Node]) -> None:
        """Each operation in turn, the last first: the gradients of its inputs come, then the gradient of its output
        goes, and what it kept."""
        for node in reversed(nodes):
            if node.inner:  # a checkpoint: its forward runs again, and keeps what it did not keep the first time
                self.keep(node.inner)
                self.backward(node.inner)
            elif node.output.requires_grad:
                self._step(node)
            self._release(node)

    def _release(self, node: Node) -> None:
        for value in node.saved:
            self._users[value] -= 1
            if self._users[value] == 0:
                self.live -= value.bytes

    def _step(self, node: Node) -> None:
        """The backward of one operation."""
        output_gradient = self._gradients.pop(node.output, 0)
        if node.is_addition:  # the one tensor ∂L/∂output is the gradient of both inputs: counted for the first
            for position, value in enumerate(node.inputs):
                self._gradients[value] = output_gradient if position == 0 else 0
            return
        numbers = sum(parameter.numel() for parameter in node.parameters)
        new = sum(value.bytes for value in node.inputs) + numbers * self.gradient_width
        # A parameter that has a gradient already (a tied weight): the two are added up in a third tensor, in passing.
        tied_numbers = sum(parameter.numel() for parameter in node.parameters if parameter in self._trained)
        tied = tied_numbers * self.gradient_width
        self.peak = max(self.peak, self.live + new + tied + node.scratch)

        replaced = sum(self._gradients.get(value, 0) for value in node.inputs)  # added to the new one, then freed
        self.live += new - tied - output_gradient - replaced
        for value in node.inputs:
            self._gradients[value] = value.bytes
        self._trained.update(node.parameters)
