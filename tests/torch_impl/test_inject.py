"""`apply_dora`: what it replaces, what it freezes, what it refuses."""

import bitsandbytes
import peft
import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from torch_impl import DoraConfig, DoraLayer, DoraLinear, PackedBase, ShardConfig, apply_dora
from torch_impl.errors import DtypeError, NonFiniteError, RankError, StorageError, TargetError
from torch_impl.preflight.report import preflight


class Two(nn.Module):
    """Two linear layers and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.down = nn.Linear(8, 6, bias=False)


def t5() -> nn.Module:
    """Asks `wo.weight` for its dtype, and casts to it."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config)


def mamba() -> nn.Module:
    """Multiplies by `dt_proj.weight` itself."""
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=1, time_step_rank=2)
    return MambaForCausalLM(config)


def dora_names(model: nn.Module) -> list[str]:
    """Names of the DoRA layers."""
    return [name for name, module in model.named_modules() if isinstance(module, DoraLayer)]


@pytest.mark.parametrize(
    ("targets", "names"),
    [("all-linear", ["up", "down"]), (["up"], ["up"]), ("d.*n", ["down"]), (("up", "down"), ["up", "down"])],
    ids=str,
)
def test_targets_are_read_as_peft_reads_them(targets: object, names: list[str]) -> None:
    """All linear layers, a list of endings, or a regular expression for the whole name."""
    model = apply_dora(Two(), DoraConfig(rank=2, alpha=4, target_modules=targets))

    assert dora_names(model) == names


def test_only_adapters_train() -> None:
    """Everything but A, B and m is frozen."""
    model = apply_dora(Two(), DoraConfig(rank=2, alpha=4, target_modules=["up"]))

    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"up.lora_A", "up.lora_B", "up.magnitude"}


def test_all_linear_leaves_a_tied_output_embedding_alone() -> None:
    """The output head of a causal language model is no target of "all-linear", and stays tied."""
    config = LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = apply_dora(LlamaForCausalLM(config), DoraConfig(rank=2, alpha=4))

    assert len(dora_names(model)) == 7
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_layer_with_two_names_stays_one_layer() -> None:
    """A module that is shared is replaced at both of its names by one adapter."""
    model = Two()
    model.again = model.up
    apply_dora(model, DoraConfig(rank=2, alpha=4))

    assert model.again is model.up
    assert isinstance(model.up, DoraLinear)


def test_a_packed_linear4bit_is_taken_over_as_it_is() -> None:
    """What bitsandbytes has packed keeps its bytes and its state, whatever storage it came in."""
    linear = bitsandbytes.nn.Linear4bit(64, 32, bias=False, quant_type="nf4", quant_storage=torch.bfloat16).to("cpu")
    want = bitsandbytes.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    layer = apply_dora(nn.Sequential(linear), DoraConfig(rank=2, alpha=4))[0]

    assert isinstance(layer.base, PackedBase)
    assert torch.equal(layer.base.decode(layer.base.weight, dtype=want.dtype), want)


@pytest.mark.parametrize("targets", [["missing"], "x.*", ["u"]], ids=str)
def test_targets_that_match_nothing_are_refused(targets: object) -> None:
    """The message names the targets, and layers that exist."""
    with pytest.raises(TargetError, match=r"match nothing.*up"):
        apply_dora(Two(), DoraConfig(rank=2, alpha=4, target_modules=targets))


class Odd(nn.Module):
    """Layers that can and can't be adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.bounded = nn.Embedding(9, 6, max_norm=1.0)
        self.counted = nn.Embedding(9, 6, scale_grad_by_freq=True)
        self.scaled = ScaledEmbedding(9, 6)
        self.conv = nn.Conv2d(4, 8, 3, groups=4)
        self.up = nn.ConvTranspose1d(4, 4, 3)
        self.old = Conv1D(6, 6)
        self.linear = nn.Linear(6, 6)


class ScaledEmbedding(nn.Embedding):
    """An embedding that computes something else."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Look up, and double."""
        return 2 * super().forward(ids)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")  # peft mends it
def test_all_linear_takes_conv1d_and_no_other_kind() -> None:
    """Linear layers and transformers' Conv1D, as peft has it."""
    config = peft.LoraConfig(r=2, target_modules="all-linear")
    theirs = [n for n, m in peft.get_peft_model(Odd(), config).base_model.model.named_modules() if hasattr(m, "lora_A")]

    model = apply_dora(Odd(), DoraConfig(rank=2, alpha=4))

    assert dora_names(model) == theirs == ["old", "linear"]


REFUSED = {
    "embedding-nf4": (
        {"quant": "nf4"},
        "table",
        StorageError,
        r"quant 'nf4' can't store table, a Embedding; target lin",
    ),
    "convolution-nf4": (
        {"quant": "nf4"},
        "conv",
        StorageError,
        "quant 'nf4' can't store conv, a Conv2d; target linear",
    ),
    "transposed": (
        {},
        "up",
        TargetError,
        r"up is a ConvTranspose1d; target nn\.Linear, Conv1D, nn\.Embedding or nn\.Co",
    ),
    "own-forward": ({}, "scaled", TargetError, "scaled is a ScaledEmbedding, whose forward is its own; leave it out"),
    "max-norm": ({}, "bounded", TargetError, r"bounded has max_norm=1\.0; unset it"),
    "by-frequency": ({}, "counted", TargetError, "counted has scale_grad_by_freq=True; unset it"),
    "rank-of-group": (
        {"rank": 10},
        "conv",
        RankError,
        r"rank 10 is .* of conv, \(2, 9\) \(one of 4 groups\); use at most 9",
    ),
    "rank-of-table": ({"rank": 10}, "table", RankError, r"rank 10 is larger than both sides of table, \(6, 9\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_kind_cannot_take_is_refused_in_one_line(name: str) -> None:
    """Value, place and mend, before anything is changed; preflight says the same."""
    config, target, error, words = REFUSED[name]
    made = DoraConfig(**({"rank": 2, "alpha": 4, "target_modules": ["linear", target]} | config))
    model = Odd()

    with pytest.raises(error, match=words) as caught:
        apply_dora(model, made)
    assert "\n" not in str(caught.value)
    assert dora_names(model) == []
    errors = [f for f in preflight(model, ShardConfig(), dora=made).findings if f.level == "error"]
    assert any("apply_dora refuses it" in f.consequence and f.parameter.startswith(target) for f in errors)


class Router(nn.Linear):
    """A linear layer that computes something else, as routers of mixtures do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Its own probabilities."""
        return super().forward(x).softmax(dim=-1)


def routed() -> nn.Module:
    """A linear layer, and a router."""
    return nn.ModuleDict({"linear": nn.Linear(6, 6), "router": Router(6, 6)})


def scaled() -> nn.Module:
    """A linear layer, and one of integers whose scales lie elsewhere."""
    model = nn.ModuleDict({"linear": nn.Linear(6, 6), "packed": nn.Linear(6, 6)})
    model["packed"].weight = nn.Parameter(torch.ones(6, 6, dtype=torch.int8), requires_grad=False)
    return model


def adapted() -> nn.Module:
    """A model that has an adapter."""
    return apply_dora(Two(), DoraConfig(rank=2, alpha=4, target_modules=["up"]))


def unloaded() -> nn.Module:
    """A model without weights."""
    return Two().to("meta")


UNREADY = {
    "linear-of-its-own": (routed, "router is a Router, whose forward is its own; leave it out"),
    "integers": (scaled, "packed.weight is torch.int8, and means nothing without its scales; load"),
    "adapted": (adapted, "up has an adapter already; name all targets in one call"),
    "meta": (unloaded, "up.weight is on the meta device: .*; load the weights first"),
}


@pytest.mark.parametrize("compute", [None, torch.float32], ids=str)
@pytest.mark.parametrize("name", UNREADY)
def test_a_model_that_cannot_be_adapted_is_left_as_it_is(name: str, compute: torch.dtype | None) -> None:
    """In one line, whatever the compute dtype."""
    make, words = UNREADY[name]
    model = make()
    before = [
        (name, type(module), p.requires_grad) for name, module in model.named_modules() for p in module.parameters()
    ]

    with pytest.raises(TargetError, match=words) as caught:
        apply_dora(model, DoraConfig(rank=2, alpha=4, compute_dtype=compute))

    assert "\n" not in str(caught.value)
    after = [
        (name, type(module), p.requires_grad) for name, module in model.named_modules() for p in module.parameters()
    ]
    assert after == before


def test_a_target_that_is_no_linear_is_refused() -> None:
    """A norm is named, with what it is."""
    with pytest.raises(TargetError, match="norm is a LayerNorm"):
        apply_dora(Two(), DoraConfig(rank=2, alpha=4, target_modules=["norm"]))


def test_a_rank_larger_than_both_sides_is_refused() -> None:
    """Rank 9 on an 8 x 6 layer is named with the layer; rank 8, larger than one side, is taken."""
    with pytest.raises(RankError, match=r"rank 9 is larger than both sides of up, \(8, 6\)"):
        apply_dora(Two(), DoraConfig(rank=9, alpha=4))
    assert dora_names(apply_dora(Two(), DoraConfig(rank=8, alpha=4))) == ["up", "down"]


@pytest.mark.parametrize("quant", [None, "nf4"], ids=["dense", "nf4"])
def test_q7_non_finite_weights_and_biases_are_refused(quant: str | None) -> None:
    """The message names the tensor and the index, and the model is left as it was."""
    model = Two()
    with torch.no_grad():
        model.up.bias[5] = float("nan")

    with pytest.raises(NonFiniteError, match=r"up\.bias holds nan at index \(5,\)"):
        apply_dora(model, DoraConfig(rank=2, alpha=4, quant=quant))
    assert dora_names(model) == []
    assert model.up.weight.requires_grad


@pytest.mark.parametrize("quant", [None, "nf4"], ids=["dense", "nf4"])
def test_a_dtype_that_cannot_be_computed_in_is_refused(quant: str | None) -> None:
    """A float64 model needs a compute dtype, and can't be packed."""
    with pytest.raises(DtypeError, match=r"up\.weight is torch\.float64"):
        apply_dora(Two().double(), DoraConfig(rank=2, alpha=4, quant=quant))


def test_q7_packed_weights_that_decode_to_nan_are_refused() -> None:
    """A weight that bitsandbytes has packed with an absmax of NaN is taken over, or refused for its norm alone."""
    model = Two()
    packed = bitsandbytes.nn.Linear4bit(6, 8, quant_type="nf4", compress_statistics=False)
    packed.weight = bitsandbytes.nn.Params4bit(torch.randn(8, 6), requires_grad=False, compress_statistics=False).to(
        "cpu"
    )
    packed.weight.quant_state.absmax[0] = torch.nan
    model.up = packed

    with pytest.raises(NonFiniteError, match=r"up\.weight"):
        apply_dora(model, DoraConfig(rank=2, alpha=4, target_modules=["up"]))


def test_q7_a_dense_weight_that_is_not_finite_is_named() -> None:
    """A dense weight with an infinite number is refused for its norm alone, without its name and index."""
    model = Two()
    with torch.no_grad():
        model.up.weight[2, 3] = torch.inf

    with pytest.raises(NonFiniteError, match=r"up\.weight holds inf at index \(2, 3\)"):
        apply_dora(model, DoraConfig(rank=2, alpha=4))


@pytest.mark.parametrize("quant", [None, "nf4"], ids=["dense", "nf4"])
def test_a_model_that_asks_for_a_weight_is_answered(quant: str | None) -> None:
    """T5 trains in bfloat16: its dtype is the weight's, packed or not."""
    model = apply_dora(t5().bfloat16(), DoraConfig(rank=2, alpha=4, quant=quant))
    ids = torch.arange(8).reshape(1, 8)

    model(input_ids=ids, labels=ids).loss.backward()

    wo = model.encoder.block[0].layer[-1].DenseReluDense.wo
    assert (wo.weight.dtype, tuple(wo.weight.shape), wo.weight.device.type) == (torch.bfloat16, (16, 24), "cpu")
    assert wo.magnitude.grad is not None


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Embedding(5, 3), (5, 3)), (Conv1D(4, 6), (6, 4)), (nn.Conv2d(4, 6, 3), (6, 4, 3, 3))]
)
def test_a_weight_has_the_plain_layer_s_shape(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """As it was stored."""
    model = apply_dora(nn.Sequential(layer), DoraConfig(rank=2, alpha=4, target_modules=["0"]))

    assert tuple(model[0].weight.shape) == shape


def test_a_model_that_computes_past_its_adapter_is_refused() -> None:
    """Mamba's step sizes are made of `dt_proj.weight`: its adapter would change nothing, without a word."""
    model = apply_dora(mamba(), DoraConfig(rank=2, alpha=4))

    with pytest.raises(TargetError, match=r"computes past its adapter.*leave that layer out"):
        model(input_ids=torch.arange(8).reshape(1, 8))


def test_a_model_whose_adapters_it_passes_by_trains_without_them() -> None:
    """With the others alone."""
    targets = ["in_proj", "x_proj", "out_proj"]
    model = apply_dora(mamba(), DoraConfig(rank=2, alpha=4, target_modules=targets))

    model(input_ids=torch.arange(8).reshape(1, 8)).logits.sum().backward()

    assert all(module.magnitude.grad is not None for module in model.modules() if isinstance(module, DoraLayer))
