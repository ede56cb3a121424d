"""What the tests of the text task share: models, the shipped one and random ones, and a few examples."""

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from lora_ref.course.classifiers import seeded
from lora_ref.course.text.grammar import examples
from lora_ref.course.text.language_model import language_model

SHIPPED, TOKENIZER = language_model()
END = TOKENIZER.eos_token_id
EXAMPLES = examples("restaurants", 5, seed=1, texts=2) + examples("weather", 2, seed=1)


def tiny(seed=0, **more):
    """A random Llama whose attention has no square matrix: q_proj (64, 32), k_proj and v_proj (16, 32)."""
    sizes = {"vocab_size": len(TOKENIZER), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16, "initializer_range": 0.3}
    return seeded(seed, lambda: LlamaForCausalLM(LlamaConfig(**sizes | heads | more))).eval()


MODELS = {"tiny": tiny(), "tied": tiny(1, tie_word_embeddings=True), "shipped": SHIPPED}
each_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
