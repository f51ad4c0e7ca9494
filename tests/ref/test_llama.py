"""The reference decoder computes what transformers' Llama computes, and refuses a checkpoint that is something else."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch.nn import functional

from parity.models.pretrained import PretrainedUnavailable, locate, token_ids
from ref import checkpoint, dora, llama
from ref.types import Adapter, InputError

LIFTED = 1e-9
"""Float64 on both sides, thirty layers of sums in different orders: some 1e4 u, and more room still (issue's bound)."""
STOCK = 1e-5
"""Transformers casts norms, softmax and angles to float32 (u = 6e-8) even in a float64 model (issue's bound)."""
SCALING = 2.0
TINY = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.fixture(scope="module")
def smollm2():
    """The real model, or a skip that says why."""
    try:
        return locate(None)
    except PretrainedUnavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture
def lifted(monkeypatch):
    """Transformers' Llama without its casts to float32."""
    from transformers.models.llama import modeling_llama as m  # noqa: PLC0415 - seconds to import

    def norm(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    def rotary(self, x, position_ids):
        angles = position_ids[..., None].to(x.dtype) * self.inv_freq.to(x.dtype)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()

    monkeypatch.setattr(m.LlamaRMSNorm, "forward", norm)
    monkeypatch.setattr(m.LlamaRotaryEmbedding, "forward", rotary)
    monkeypatch.setattr(functional, "softmax", lambda x, dim, dtype=None: torch.softmax(x, dim))  # noqa: ARG005


def hugging_face(directory, *, layers):
    """The model in float64, as transformers has it."""
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - seconds to import

    options = {"num_hidden_layers": layers, "attn_implementation": "eager", "local_files_only": True}
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options).double()


def torch_results(model, ids):
    """Its logits, and every parameter's gradient of the mean cross entropy."""
    logits = model(input_ids=torch.from_numpy(ids[None, :-1]), use_cache=False).logits
    functional.cross_entropy(logits[0], torch.from_numpy(ids[1:])).backward()
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach().numpy(), gradients


def distances(got, want):
    """The relative 2-norm of each tensor's difference; the names must be the same."""
    assert set(got) == set(want)
    return {name: float(np.linalg.norm(got[name] - want[name]) / np.linalg.norm(want[name])) for name in want}


def worst(got, want):
    """The tensor that is farthest off, and by how much."""
    found = distances(got, want)
    name = max(found, key=found.get)
    return found[name], name


def reference_results(directory, ids, *, layers):
    """The same from the reference."""
    config = checkpoint.LlamaConfig.from_json(directory / "config.json")
    parameters = checkpoint.read_checkpoint(directory, dtype="float64", layers=layers)
    tokens, targets = jnp.asarray(ids[None, :-1]), jnp.asarray(ids[None, 1:])
    logits = jax.jit(lambda p: llama.logits(p, tokens, config))(parameters)
    gradient = jax.jit(jax.grad(lambda p: llama.loss(p, tokens, targets, config)))(parameters)
    return np.asarray(logits), {name: np.asarray(g) for name, g in checkpoint.by_name(gradient).items()}


def compare(directory, *, layers, tokens):
    """The worst distance of logits and gradients, and where."""
    ids = token_ids(directory, tokens + 1)
    logits, gradients = torch_results(hugging_face(directory, layers=layers), ids)
    got_logits, got_gradients = reference_results(directory, ids, layers=layers)
    return worst({"logits": got_logits} | got_gradients, {"logits": logits} | gradients)


@pytest.mark.usefixtures("lifted")
def test_two_blocks_equal_transformers_in_float64(smollm2):
    """Logits and every gradient of the first two blocks agree with transformers' lifted Llama."""
    off, where = compare(smollm2, layers=2, tokens=48)

    assert off < LIFTED, where


def test_two_blocks_equal_the_stock_model(smollm2):
    """So they do with the stock model in double, as far as its own float32 allows."""
    off, where = compare(smollm2, layers=2, tokens=48)

    assert off < STOCK, where


@pytest.mark.long
@pytest.mark.usefixtures("lifted")
def test_thirty_blocks_equal_transformers_in_float64(smollm2):
    """The whole model agrees with transformers' lifted Llama."""
    off, where = compare(smollm2, layers=30, tokens=16)

    assert off < LIFTED, where


@pytest.mark.long
def test_thirty_blocks_equal_the_stock_model(smollm2):
    """The whole model agrees with the stock one in double, as far as its own float32 allows."""
    off, where = compare(smollm2, layers=30, tokens=16)

    assert off < STOCK, where


class TorchDora(torch.nn.Module):
    """D5, D8 by hand, its norm detached."""

    def __init__(self, linear, adapter):
        super().__init__()
        self.weight, self.bias = linear.weight.detach(), linear.bias
        as_parameter = lambda a: torch.nn.Parameter(torch.tensor(np.asarray(a)))  # noqa: E731 - three of a kind
        self.lora_A, self.lora_B = as_parameter(adapter.lora_A), as_parameter(adapter.lora_B)
        self.magnitude = as_parameter(adapter.magnitude)

    def forward(self, x):
        """Multiply by the merged weight."""
        V = self.weight + SCALING * self.lora_B @ self.lora_A
        y = functional.linear(x, V) * (self.magnitude / V.norm(dim=1).detach())
        return y if self.bias is None else y + self.bias


def random_adapters(named, names):
    """An adapter with B != 0 for each layer, magnitudes off the norm."""
    generator = np.random.default_rng(5)
    adapters = {}
    for name in names:
        fan_out, fan_in = named[f"{name}.weight"].shape
        A = jnp.asarray(generator.standard_normal((4, fan_in)) / np.sqrt(fan_in))
        B = jnp.asarray(0.05 * generator.standard_normal((fan_out, 4)))
        m = 1.1 * jnp.asarray(np.linalg.norm(named[f"{name}.weight"] + SCALING * B @ A, axis=1))
        adapters[name] = Adapter(A, B, m)
    return adapters


def adapter_gradients_in_torch(model, adapters, ids):
    """A, B, m of each layer, by autograd."""
    for name, adapter in adapters.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, TorchDora(model.get_submodule(name), adapter))
    _, gradients = torch_results(model, ids)
    return {n: g for n, g in gradients.items() if "lora" in n or "magnitude" in n}


def flat(adapters):
    """Gradients by tensor name."""
    fields = ("lora_A", "lora_B", "magnitude")
    return {f"{name}.{field}": np.asarray(getattr(a, field)) for name, a in adapters.items() for field in fields}


@pytest.mark.usefixtures("lifted")
def test_d5_adapters_gradients_equal_autograd(smollm2):
    """With adapters on every linear layer, A, B and m get the gradients that torch's autograd gives them."""
    ids = token_ids(smollm2, 33)
    config = checkpoint.LlamaConfig.from_json(smollm2 / "config.json")
    parameters = checkpoint.read_checkpoint(smollm2, dtype="float64", layers=2)
    adapters = random_adapters(checkpoint.by_name(parameters), checkpoint.linear_names(config, layers=2))
    tokens, targets = jnp.asarray(ids[None, :-1]), jnp.asarray(ids[None, 1:])

    @jax.jit
    def gradient(adapters, parameters):
        return jax.grad(lambda a: llama.loss(parameters, tokens, targets, config, adapters=a, scaling=SCALING))(
            adapters
        )

    off, where = worst(
        flat(gradient(adapters, parameters)),
        adapter_gradients_in_torch(hugging_face(smollm2, layers=2), adapters, ids),
    )

    assert off < LIFTED, where


def tiny(directory, **changes):
    """A small random Llama, saved by transformers: (model, configuration, parameters)."""
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415 - seconds to import

    torch.manual_seed(3)
    settings = TINY | changes
    model = LlamaForCausalLM(LlamaConfig(**settings, attn_implementation="eager"))
    for p in model.parameters():
        p.data.normal_(std=0.3)  # biases and norms as well
    model.save_pretrained(directory)
    config = checkpoint.LlamaConfig.from_json(directory / "config.json")
    return model.double(), config, checkpoint.read_checkpoint(directory, dtype="float64")


@pytest.mark.usefixtures("lifted")
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="untied"),
        pytest.param({"tie_word_embeddings": True}, id="tied"),
        pytest.param({"attention_bias": True, "mlp_bias": True}, id="biases"),
        pytest.param({"num_key_value_heads": 6}, id="a key for each head"),
        pytest.param({"num_key_value_heads": 1}, id="one key"),
        pytest.param({"head_dim": 8}, id="head_dim apart"),
        pytest.param({"rope_parameters": {"rope_theta": 5e5} | LLAMA3}, id="llama3 positions"),
        pytest.param(
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}}, id="linear positions"
        ),
    ],
)
def test_every_kind_of_llama_equals_transformers(tmp_path, changes):
    """Each form that a configuration may ask for gives transformers' logits."""
    model, config, parameters = tiny(tmp_path, **changes)
    tokens = np.arange(24, dtype=np.int64).reshape(2, 12)
    frequencies = jnp.asarray(model.model.rotary_emb.inv_freq.numpy())

    got = llama.logits(parameters, jnp.asarray(tokens), config, inverse_frequencies_F=frequencies)

    want = model(input_ids=torch.from_numpy(tokens)).logits.detach().numpy()
    assert distances({"logits": np.asarray(got)}, {"logits": want})["logits"] < LIFTED


@pytest.mark.parametrize(
    ("rope", "ulps"),
    [
        pytest.param({"rope_theta": 1e5, "rope_type": "default"}, 0, id="default"),
        pytest.param({"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}, 0, id="linear"),
        pytest.param({"rope_theta": 5e5} | LLAMA3, 4, id="llama3: transformers blends in float32, in five roundings"),
    ],
)
def test_frequencies_are_transformers_own(tmp_path, rope, ulps):
    """The frequencies are float32, and transformers' to the bit where nothing is blended."""
    model, config, _ = tiny(tmp_path, head_dim=64, rope_parameters=rope)
    want = model.model.rotary_emb.inv_freq.float().numpy()

    got = llama.inverse_frequencies(config)

    assert got.dtype == np.float32
    np.testing.assert_array_max_ulp(got, want, maxulp=ulps)


def test_t1_filled_up_sequences_weigh_nothing(tmp_path):
    """Two sequences of unequal length, one filled up at its end, have the loss of the two apart."""
    _, config, parameters = tiny(tmp_path)
    ids = jnp.arange(1, 13)
    long, short = ids[None, :8], ids[None, 8:11]
    filled = jnp.pad(short, ((0, 0), (0, 4)))
    weights = jnp.asarray([[1.0] * 7, [1.0] * 2 + [0.0] * 5])
    together = jnp.concatenate([long, jnp.pad(filled, ((0, 0), (0, 1)))])

    got = llama.loss(parameters, together[:, :-1], together[:, 1:], config, weights_BS=weights)

    parts = [llama.loss(parameters, part[:, :-1], part[:, 1:], config, total=9) for part in (long, short)]
    np.testing.assert_allclose(got, sum(parts), rtol=LIFTED)


def test_with_weights_is_a_checkpoint_with_those_weights(tmp_path):
    """D6, Q4: a replaced weight is what the forward multiplies by, and no other changes."""
    _, _, parameters = tiny(tmp_path)
    name = "model.layers.1.mlp.up_proj"
    replaced = llama.with_weights(parameters, {name: jnp.zeros((40, 24), jnp.float32)})

    before, after = checkpoint.by_name(parameters), checkpoint.by_name(replaced)

    changed = [key for key in before if not np.array_equal(before[key], after[key])]
    assert changed == [f"{name}.weight"]
    assert after[changed[0]].dtype == jnp.float64


def test_d12_neutral_adapters_change_nothing(tmp_path):
    """Adapters with B = 0 and m = n leave the logits where they were."""
    _, config, parameters = tiny(tmp_path)
    named, tokens = checkpoint.by_name(parameters), jnp.arange(12)[None]
    adapters = {}
    for name in checkpoint.linear_names(config):
        W = named[f"{name}.weight"]
        A, B = jnp.ones((2, W.shape[1])), jnp.zeros((W.shape[0], 2))
        adapters[name] = Adapter(A, B, dora.initial_magnitude(W, A, B, scaling=SCALING))

    got = llama.logits(parameters, tokens, config, adapters=adapters, scaling=SCALING)

    np.testing.assert_allclose(got, llama.logits(parameters, tokens, config), rtol=LIFTED)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        pytest.param(["lm_head"], "'lm_head' is no linear layer", id="the head"),
        pytest.param(["model.layers.3.mlp.up_proj"], "is no linear layer", id="beyond the last layer"),
        pytest.param(["model.layers.1.mlp.up_proj"], "layers.0.mlp.up_proj has no adapter", id="one layer of three"),
    ],
)
def test_adapters_that_fit_no_stack_are_refused(tmp_path, names, said):
    """An adapter for something else, or for some layers only, is named."""
    _, config, parameters = tiny(tmp_path)
    adapter = Adapter(jnp.zeros((2, 24)), jnp.zeros((40, 2)), jnp.ones(40))

    with pytest.raises(InputError, match=said):
        llama.logits(
            parameters, jnp.zeros((1, 2), jnp.int32), config, adapters=dict.fromkeys(names, adapter), scaling=1.0
        )


def test_a_bf16_checkpoint_is_read_to_the_bit(tmp_path):
    """Reading widens bf16 exactly."""
    tiny(tmp_path)
    path = tmp_path / "model.safetensors"
    narrow = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in load_file(path).items()}
    save_file(narrow, path)

    got = checkpoint.by_name(checkpoint.read_checkpoint(tmp_path, dtype="float64"))

    for name, tensor in narrow.items():
        np.testing.assert_array_equal(got[name], tensor.astype(np.float64))


def test_fewer_layers_are_the_first_ones(tmp_path):
    """With layers=2 the first two blocks are read, and the last norm and the head still."""
    _, _, whole = tiny(tmp_path)

    part = checkpoint.by_name(checkpoint.read_checkpoint(tmp_path, dtype=jnp.float64, layers=2))

    named = checkpoint.by_name(whole)
    assert set(named) - set(part) == {name for name in named if name.startswith("model.layers.2.")}
    assert all(np.array_equal(part[name], named[name]) for name in part)


def test_a_checkpoint_that_differs_is_refused_with_every_difference(tmp_path):
    """Missing, surplus and misshapen tensors are all listed, and nothing is read."""
    tiny(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    tensors |= {"stray": np.zeros(1, np.float32), "lm_head.weight": np.zeros((32, 25), np.float32)}
    save_file(tensors, path)

    with pytest.raises(checkpoint.CheckpointMismatch) as caught:
        checkpoint.read_checkpoint(tmp_path, dtype="float64")

    said = str(caught.value)
    assert "model.norm.weight is missing" in said
    assert "stray is no part" in said
    assert "lm_head.weight has shape (32, 25), wanted (32, 24)" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param({"model_type": "qwen2"}, "model_type is 'qwen2'", id="family"),
        pytest.param({"hidden_act": "gelu"}, "hidden_act is 'gelu'", id="activation"),
        pytest.param({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn'", id="positions"),
        pytest.param({"vocab_size": None}, "no vocab_size", id="size"),
    ],
)
def test_another_architecture_is_refused(tmp_path, change, said):
    """What the decoder does not compute, it does not read."""
    (tmp_path / "config.json").write_text(json.dumps(TINY | change))

    with pytest.raises(checkpoint.CheckpointMismatch, match=said):
        checkpoint.LlamaConfig.from_json(tmp_path / "config.json")


def test_a_truncated_file_is_refused(tmp_path):
    """A file that was cut short is named."""
    tiny(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])

    with pytest.raises(checkpoint.CheckpointMismatch, match=r"model\.safetensors cannot be read"):
        checkpoint.read_checkpoint(tmp_path, dtype="float64")


def test_more_layers_than_there_are_is_refused(tmp_path):
    """Four layers of three cannot be had."""
    tiny(tmp_path)

    with pytest.raises(checkpoint.CheckpointMismatch, match="4 layers of 3"):
        checkpoint.read_checkpoint(tmp_path, dtype="float64", layers=4)


@pytest.mark.parametrize("text", [None, "{", "[1]"], ids=["no file", "no JSON", "no object"])
def test_a_directory_without_a_configuration_is_refused(tmp_path, text):
    """By the file's name, with what to give."""
    if text is not None:
        (tmp_path / "config.json").write_text(text)

    with pytest.raises(checkpoint.CheckpointMismatch, match=r"config.json: .*; give a Hugging Face model"):
        checkpoint.read_checkpoint(tmp_path, dtype="float32")
