"""A small causal model with a byte-level tokenizer, and text, written as Hugging Face writes them."""

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

SMALL = 48


def write_model(folder: Path, *, kind: str = "llama", hidden: int = SMALL) -> Path:
    """A model of some 30,000 parameters: `llama` (tied embeddings, grouped-query attention), `gpt2` or `gpt-oss`.

    A `hidden` size of 768 makes it one of 20 million, which takes a while to load.
    """
    torch.manual_seed(0)
    if kind == "llama":
        config = LlamaConfig(
            vocab_size=257, hidden_size=hidden, intermediate_size=hidden * 3 // 2, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, eos_token_id=0, bos_token_id=None,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    elif kind == "gpt-oss":
        model = experts_model()
    else:
        config = GPT2Config(vocab_size=257, n_embd=48, n_layer=2, n_head=4, n_positions=64, eos_token_id=0)
        model = GPT2LMHeadModel(config)
    model.save_pretrained(folder, max_shard_size="40KB" if kind == "llama" and hidden == SMALL else "5GB")
    vocabulary = {"<eos>": 0} | {c: i + 1 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytewise = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<eos>").save_pretrained(folder)  # noqa: S106
    return folder


def experts_model() -> GptOssForCausalLM:
    """Five experts in each of two blocks, which tokens visit two at a time."""
    config = GptOssConfig(
        vocab_size=257, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, head_dim=8,
        num_key_value_heads=1, num_local_experts=5, num_experts_per_tok=2, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = GptOssForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 3:
                parameter.normal_(std=0.1)
    return model


def write_text(path: Path, *, documents: int = 40) -> Path:
    """Paragraphs of unequal lengths."""
    pick = random.Random(5)  # noqa: S311 - text, not a secret
    words = ["sea", "ship", "the", "of", "whale", "and", "captain", "storm", "old", "sail"]
    texts = [" ".join(pick.choices(words, k=pick.randint(2, 12))) for _ in range(documents)]
    path.write_text("\n\n".join(texts))
    return path
