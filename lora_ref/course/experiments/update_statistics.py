"""The measures of `svd` and `updates` on all matrices of a fine-tuned model, each beside what chance would give."""

import torch
from torch import Tensor, nn

from ...layers import LoRALayer
from ...model import lora_layers
from ...svd import rank_at_energy
from ...updates import amplification, amplification_null, intruders, similarity_null, subspace_similarity

Updates = dict[str, tuple[Tensor, Tensor]]  # path → (W0, ΔW)


def updates(before: dict[str, Tensor], model: nn.Module) -> Updates:
    """The update ΔW of every linear layer of a fine-tuned model, beside the weight W0 that it changes.

    Of an adapted model ΔW = s·B·A, of any other the difference to `before`. Embeddings and the head are left out.

    Args:
        before: the base's state_dict.
        model: the fine-tuned model.

    Returns:
        Path → (W0, ΔW), both (d, k).

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2))
        >>> before = {name: value.clone() for name, value in model.state_dict().items()}
        >>> with torch.no_grad():
        ...     _ = model[0].weight.add_(1)
        >>> W0, dW = updates(before, model)["0"]
        >>> torch.equal(W0, before["0.weight"]), dW.round().tolist()
        (True, [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    """
    if any(isinstance(module, LoRALayer) for module in model.modules()):
        return {
            path: (layer.weight.detach(), (layer.scale * layer.lora_B @ layer.lora_A).detach())
            for path, layer in lora_layers(model).items()
        }
    found = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear) and "head" not in path}
    return {path: (before[f"{path}.weight"], m.weight.detach() - before[f"{path}.weight"]) for path, m in found.items()}


def measures(W0: Tensor, dW: Tensor, r: int = 8) -> dict[str, float]:
    """What one update looks like, with W0 (d, k), ΔW (d, k), and beside each measure what chance gives.

    size = ‖ΔW‖/‖W0‖; rank 90: the rank at 90 % of ΔW's energy; presence = ‖U_rᵀW0V_r‖/‖(W0)_r‖, U_r and V_r the first
    r singular vectors of ΔW: 1 if they are W0's own; amplification = ‖ΔW_r‖/‖U_rᵀW0V_r‖; intruders: see `updates`.
    "noise" is a Gaussian update of the same size, "noise of rank r" a product of two Gaussian factors.
    """
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(dW.shape, generator=g)
    noisy = W0 + noise * (dW.norm() / noise.norm())
    thin = torch.randn(len(dW), r, generator=g) @ torch.randn(r, dW.shape[1], generator=g)
    factor, own = amplification(W0, dW, r), torch.linalg.svdvals(W0)[:r].norm()
    shift = torch.linalg.svdvals(dW)[:r].norm()
    return {
        "size": (dW.norm() / W0.norm()).item(),
        "rank 90": rank_at_energy(dW, 0.9),
        "rank 90, noise": rank_at_energy(noise, 0.9),
        "presence in W0": (shift / factor / own).item(),
        "presence in W0, random directions": (r * W0.norm() / W0.numel() ** 0.5 / own).item(),
        "amplification": factor,
        "amplification, random directions": amplification_null(W0, dW, r),
        "intruders": intruders(W0, W0 + dW),
        "intruders, noise": intruders(W0, noisy),
        "intruders, noise of rank r": intruders(W0, W0 + thin * (dW.norm() / thin.norm())),
    }


def overlap(one: Tensor, other: Tensor, r: int = 8) -> dict[str, float]:
    """φ of two updates' first r left, and right, singular vectors, and what random subspaces would give."""
    U, _, Vh = torch.linalg.svd(one, full_matrices=False)
    P, _, Qh = torch.linalg.svd(other, full_matrices=False)
    d, k = one.shape
    return {
        "left": subspace_similarity(U, P, r, r),
        "left, random": similarity_null(d, r, r),
        "right": subspace_similarity(Vh.T, Qh.T, r, r),
        "right, random": similarity_null(k, r, r),
    }


def mean(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """The mean of each measure over layers: path → measures → their mean."""
    rows = list(found.values())
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
