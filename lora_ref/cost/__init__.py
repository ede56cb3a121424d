"""What a training step of a transformer takes, from its shapes alone: parameters, FLOPs and bytes.

    print(cost(model, LoRAConfig(r=8, target_modules=["q_proj", "v_proj"]), batch=1, length=2048, scheme="nf4"))

The model may be on the meta device: nothing is run. `families` writes the forward of each family down once, as
transformers and torch execute it. Each operation of it (`tape`; `linear` for linear layers and their adapters) has its
FLOPs, what it keeps for its backward, and which of its inputs require a gradient. The rest is adding up (`estimate`,
and `memory` for the peak).

FLOPs: a multiply-add is two, and only matrix products count. N = batch·length rows, a linear layer d×k:
    linear layer    forward 2Ndk; backward 2Ndk for ∂L/∂X, if X requires it, and 2Ndk for ∂L/∂W, if W is trained
    its adapter     forward 2Nr(d+k), backward 4Nr(d+k), less the gradients that nothing requires; as functional.py
                    does it
    attention       products of 2N·L·q, L the length and q = heads·dim, the causal half not spared: 2 forward; 4
                    backward, of which eager attention forms those that are required; the fused kernel forms all, and
                    the scores again

Numbers kept for the backward, per token and layer. h hidden, f inside the MLP, H heads, q and v the queries' and the
keys' heads·dim. A trained or adapted linear layer keeps its input, an adapted one also r numbers, a frozen one
nothing. What several operations keep counts once.
    Llama   norm: x h, x/rms h*, 1/rms 1 · input of q, k, v: h · q and k after RoPE, v: q + 2v · attention's output q,
            log-sum-exp H · norm: h, h*, 1 · input of gate and up: h · gate f, its SiLU f, up f · input of down f
                                                                            = 6h + 2q + 2v + 4f + H + 2
    GPT-2   norm: x h, mean and 1/σ 2 · input of c_attn: h · q, k, v: 3h · output h, H · norm: h, 2 · input of c_fc: h ·
            GELU, written out: 4f · input of c_proj: f                      = 8h + 5f + H + 4
    BERT    input of q, k, v: h · q, k, v: 3h · output h, H · sum h, 2 · normed: h · GELU's input f · input of the
            last layer f · sum h, 2                                         = 8h + 2f + H + 4
*for the norm's weight, if that is trained. LoRA on q and v alone leaves 3h + 2q + 2v + 3f + H + 2 + 2r of Llama's:
not what r suggests. Eager attention keeps H·L probabilities for the log-sum-exp, and k and v once for each query
head. In 16 bits a number takes two bytes, but four where torch computes in 32: RMSNorm's x, 1/rms, mean, log-sum-exp,
and the loss, which keeps N·V log-probabilities, and needs two more tensors of that size when its backward begins.

The peak is the largest sum, at any moment of the backward, of weights, optimizer's state, what is still kept,
gradients so far and scratch tensors. With checkpointing a block keeps its input alone, and runs its forward again,
up to the last tensor that its backward needs.

Sources: Hu et al. 2021 (arXiv 2106.09685); Korthikanti et al. 2022 (arXiv 2205.05198) for the way of counting; Dettmers
et al. 2023 (arXiv 2305.14314) for NF4; transformers' modeling files; torch's derivatives.yaml.
"""

from .estimate import Cost, cost
from .schemes import NF4_BITS, SCHEMES, Scheme

__all__ = ["NF4_BITS", "SCHEMES", "Cost", "Scheme", "cost"]
