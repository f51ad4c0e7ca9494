"""Clause C2: what transformers and bitsandbytes save in four bits is read straight into JAX, to the bit."""

import json
import warnings

import bitsandbytes as bnb
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from ref import checkpoint, llama, quantised_checkpoint
from ref.checkpoint import CheckpointMismatch

SIZES = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
Q = "model.layers.0.self_attn.q_proj.weight"
FLOAT32_SOMEWHERE = 1e-5
"""Transformers casts norms, softmax and angles to float32 (u = 6e-8) even in a float64 model, as test_llama has it."""


def quantised(folder, *, storage=torch.uint8, dtype=torch.float32, **kind):
    """A small Llama that transformers has quantised and saved, and the model."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).to(dtype).save_pretrained(folder / "plain")
        options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True} | kind
        config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=storage, **options)
        model = transformers.LlamaForCausalLM.from_pretrained(
            folder / "plain", quantization_config=config, device_map="cpu", dtype=dtype
        )
        model.train().save_pretrained(folder / "four_bit")
    return folder / "four_bit", model


def decoded(layer):
    """Bitsandbytes' own weight."""
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


KINDS = {
    "nested": {},
    "plain": {"bnb_4bit_use_double_quant": False},
    "fp4": {"bnb_4bit_quant_type": "fp4"},
    "bf16 storage": {"storage": torch.bfloat16, "dtype": torch.bfloat16},
    "float16 storage": {"storage": torch.float16, "dtype": torch.float16},
    "float32 storage": {"storage": torch.float32},
}


@pytest.mark.parametrize("kind", KINDS)
def test_c2_weights_are_bitsandbytes_own(tmp_path, kind):
    """Every quantised weight, read and decoded in JAX, has the bits that torch has."""
    directory, model = quantised(tmp_path, **KINDS[kind])

    got = quantised_checkpoint.read_quantised_checkpoint(directory, dtype="float32")

    assert len(got.packed) == 14
    for name in got.packed:
        layer, _, projection = name.removeprefix("model.layers.").partition(".")
        want = decoded(model.get_submodule(name)).float().numpy()
        np.testing.assert_array_equal(got.parameters.layers[f"{projection}.weight"][int(layer)], want)


def test_c2_logits_are_torchs_on_the_same_file(tmp_path):
    """The quantised network's logits are transformers', run in float64 on the weights that it decodes."""
    directory, model = quantised(tmp_path)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, bnb.nn.Linear4bit):
                plain = torch.nn.Linear(child.in_features, child.out_features, bias=False)
                plain.weight.data = decoded(child)
                setattr(parent, name, plain)
    ids = np.arange(12).reshape(1, 12)

    got = quantised_checkpoint.read_quantised_checkpoint(directory, dtype="float64")
    config = checkpoint.LlamaConfig.from_json(directory / "config.json")
    logits = np.asarray(llama.logits(got.parameters, jnp.asarray(ids), config))

    model.is_quantized = False
    for module in model.modules():  # not .to(): transformers refuses it for a model that was quantised
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and tensor.is_floating_point():
                tensor.data = tensor.data.double()
    want = model(input_ids=torch.from_numpy(ids), use_cache=False).logits.detach().numpy()
    assert np.linalg.norm(logits - want) <= FLOAT32_SOMEWHERE * np.linalg.norm(want)


def damaged(folder, change):
    """A quantised checkpoint with something done to its tensors."""
    directory, _ = quantised(folder)
    found = load_file(directory / "model.safetensors")
    change(found)
    save_file(found, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def altered(found, **changes):
    """One weight's JSON with other fields."""
    name = f"{Q}.quant_state.bitsandbytes__nf4"
    text = json.dumps(json.loads(found[name].tobytes()) | changes)
    found[name] = np.frombuffer(text.encode(), np.uint8)


FAULTS = {
    "missing": (lambda found: found.pop(f"{Q}.absmax"), "q_proj.weight.absmax is missing"),
    "extra": (lambda found: found.update(more=np.ones(1, np.float32)), "more is no part"),
    "short": (lambda found: found.update({Q: found[Q][:-1].copy()}), "wanted packed"),
    "scales": (lambda found: found.update({f"{Q}.nested_absmax": np.ones(2, np.float32)}), "nested_absmax has F32"),
    "shape": (lambda found: altered(found, shape=[64, 32]), r"shape \[64, 32\], wanted \[64, 64\]"),
    "blocksize": (lambda found: altered(found, blocksize=48), "blocksize 48"),
    "no json": (
        lambda found: found.update({f"{Q}.quant_state.bitsandbytes__nf4": np.ones(3, np.uint8)}),
        "no JSON object",
    ),
    "codebook": (
        lambda found: found.update({f"{Q}.quant_map": np.round(found[f"{Q}.quant_map"], 4)}),
        "not bitsandbytes'",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_c2_what_does_not_fit_is_named(tmp_path, fault):
    """A tensor that is missing, extra or misshapen, a state or a codebook of something else: said, and not loaded."""
    change, said = FAULTS[fault]

    with pytest.raises(CheckpointMismatch, match=said):
        quantised_checkpoint.read_quantised_checkpoint(damaged(tmp_path, change), dtype="float32")


def test_c2_every_fault_is_listed(tmp_path):
    """Two tensors that are missing stand in one error."""

    def change(found):
        found.pop(f"{Q}.absmax")
        found.pop("model.norm.weight")

    with pytest.raises(CheckpointMismatch, match=r"absmax is missing.*norm\.weight is missing"):
        quantised_checkpoint.read_quantised_checkpoint(damaged(tmp_path, change), dtype="float32")


def test_c2_a_bf16_weight_keeps_its_dtype(tmp_path):
    """The state says bf16, and decoding gives bf16 numbers."""
    directory, _ = quantised(tmp_path, dtype=torch.bfloat16)

    weight = quantised_checkpoint.read_quantised_checkpoint(directory, dtype="float32").packed[
        Q.removesuffix(".weight")
    ]

    assert weight.state.dtype == "bfloat16"
    assert np.asarray(weight.packed).dtype == np.uint8
    assert ml_dtypes.bfloat16 == np.dtype(weight.state.dtype)
