"""D16: mixtures of experts as transformers has them, against the reference, peft, and themselves without adapters."""

import warnings
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import mixtures
import numpy as np
import peft
import pytest
import torch
from mixtures import MIXTURES, STACKS, VOCABULARY
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from ref import experts as ref_experts
from ref.types import Adapter
from torch_impl import DoraConfig, QuantConfig, apply_dora, load_adapter, merge_adapter, save_adapter
from torch_impl.config import ShardConfig
from torch_impl.errors import DoraError, RankError, StorageError, TargetError
from torch_impl.files.materialize import materialize
from torch_impl.layers import quant
from torch_impl.layers.experts import DoraExperts
from torch_impl.sharding.units import plan_units

IDS = torch.randint(0, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(3))
COUNT, OUT, IN, R, S = 4, 6, 16, 2, 0.5
VISITS = [0, 2, 2, 0, 1, 2, 0]  # nobody visits expert 3
of_mixtures = pytest.mark.parametrize("name", MIXTURES)
of_orientations = pytest.mark.parametrize("transposed", [False, True])
pytestmark = [
    pytest.mark.filterwarnings("ignore:peft has no DoRA on:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


class Experts(nn.Module):
    """One stack as transformers' modules hold them, and a forward that takes an expert's matrix at a time."""

    def __init__(self, weight: Tensor, *, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.up_proj = nn.Parameter(weight.mT.contiguous() if transposed else weight)

    def forward(self, x: Tensor, visits: list[int]) -> Tensor:
        """(S, I) to (S, O)."""
        y = x.new_zeros(len(visits), OUT)
        for expert in sorted(set(visits)):
            rows = [visit for visit, other in enumerate(visits) if other == expert]
            matrix = self.up_proj[torch.tensor(expert)]
            y = y.index_put(
                (torch.tensor(rows),), x[rows] @ matrix if self.is_transposed else functional.linear(x[rows], matrix)
            )
        return y


def lattice(*, transposed: bool, **config: object) -> SimpleNamespace:
    """Exactly representable numbers: the adapted module, and the reference's inputs."""
    generator = torch.Generator().manual_seed(0)

    def integers(*shape: int, low: int = -2, high: int = 3) -> Tensor:
        return torch.randint(low, high, shape, generator=generator).float()

    A, B = integers(COUNT, R, IN, low=-1, high=2), integers(COUNT, OUT, R, low=-1, high=2)
    W = integers(COUNT, OUT, IN, low=0, high=2) * 2 - 1 - S * B @ A
    m = torch.exp2(integers(COUNT, OUT, low=0, high=3))
    made = DoraConfig(R, S * R, target_modules=(), target_parameters=["up_proj"], **config)
    model = apply_dora(nn.Sequential(Experts(W, transposed=transposed)), made)
    layer = model[0].up_proj
    with torch.no_grad():
        for parameter, value in ((layer.lora_A, A), (layer.lora_B, B), (layer.magnitude, m)):
            parameter.copy_(value)
    x, G = integers(len(VISITS), IN), integers(len(VISITS), OUT)
    adapter = Adapter(*(jnp.asarray(t.numpy()) for t in (A, B, m)))
    return SimpleNamespace(experts=model[0], layer=layer, x=x, G=G, W=W, adapter=adapter)


def gradients(layer: DoraExperts) -> dict[str, Tensor]:
    """By name."""
    return {name: parameter.grad for name, parameter in layer.named_parameters() if parameter.requires_grad}


@of_orientations
def test_d16_output_and_gradients_are_refs_to_the_bit(transposed: bool) -> None:
    """Of the adapter and of x, in both orientations; an expert that nobody visits has zeros."""
    it = lattice(transposed=transposed)
    x = it.x.requires_grad_()

    y = it.experts(x, VISITS)
    y.backward(it.G)

    arrays = [jnp.asarray(t.detach().numpy()) for t in (it.x, it.W, it.G)]
    want = ref_experts.experts(arrays[0], jnp.array(VISITS), arrays[1], it.adapter, scaling=S)
    assert np.array_equal(y.detach().numpy(), want)
    closed = ref_experts.experts_closed_form(
        arrays[0], jnp.array(VISITS), arrays[1], it.adapter, G_SO=arrays[2], scaling=S
    )
    assert np.array_equal(x.grad.numpy(), closed.x)
    for name, got in gradients(it.layer).items():
        assert np.array_equal(got.numpy(), getattr(closed, name)), name
        assert not got[3].any()
        assert got[:3].flatten(1).any(dim=1).all()


@of_orientations
def test_d10_merged_stack_is_refs(transposed: bool) -> None:
    """The plain parameter again, as the model stores it, of a module of its own class."""
    it = lattice(transposed=transposed)
    model = nn.Sequential(it.experts)

    merge_adapter(model)

    got = model[0].up_proj
    want = ref_experts.merge_experts(jnp.asarray(it.W.numpy()), it.adapter, scaling=S)
    assert isinstance(got, nn.Parameter)
    assert np.array_equal((got.mT if transposed else got).numpy(), want)
    assert type(model[0]) is Experts


def test_d10_a_module_with_two_names_is_merged_once() -> None:
    """Both names keep standing for it."""
    it = lattice(transposed=False)
    want = it.experts(it.x, VISITS)
    model = nn.ModuleDict({"one": it.experts, "other": it.experts})

    merge_adapter(model)

    assert model["one"] is model["other"]
    assert torch.equal(model["other"](it.x, VISITS), want)


def test_s3_every_adapter_has_a_gradient_where_no_token_came() -> None:
    """Zeros and not None: other ranks wait for it."""
    it = lattice(transposed=False)

    it.experts(it.x[:0], []).sum().backward()

    assert {name: tuple(g.shape) for name, g in gradients(it.layer).items()} == {
        "lora_A": (COUNT, R, IN), "lora_B": (COUNT, OUT, R), "magnitude": (COUNT, OUT)
    }  # fmt: skip
    assert not any(g.any() for g in gradients(it.layer).values())


def test_d9_dropout_is_drawn_by_visit() -> None:
    """As `nn.Dropout` draws it for each expert's tokens in turn; evaluation drops nothing."""
    it = lattice(transposed=False, dropout=0.5)
    assert torch.equal(it.experts.eval()(it.x, VISITS), lattice(transposed=False).experts(it.x, VISITS))
    it.experts.train()
    torch.manual_seed(1)
    got = it.experts(it.x, VISITS)

    torch.manual_seed(1)
    mask = torch.zeros_like(it.x)
    for expert in (0, 1, 2):
        rows = [visit for visit, other in enumerate(VISITS) if other == expert]
        mask[rows] = functional.dropout(torch.ones_like(it.x[rows]), 0.5)
    arrays = [jnp.asarray(t.numpy()) for t in (it.x, it.W, mask)]
    want = ref_experts.experts(arrays[0], jnp.array(VISITS), arrays[1], it.adapter, scaling=S, mask_SI=arrays[2])
    assert np.array_equal(got.detach().numpy(), want)


@of_mixtures
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_d12_neutral_start_is_the_plain_model_to_the_bit(name: str, dtype: torch.dtype) -> None:
    """The model's own loop over experts, in float32 and bfloat16."""
    plain = mixtures.plain(name, dtype=dtype)
    plain.config._experts_implementation = "eager"
    want = plain(IDS).logits

    model = apply_dora(plain, DoraConfig(2, 4, target_modules=["q_proj"], target_parameters=STACKS))

    assert torch.equal(model(IDS).logits, want)
    layers = [module for module in model.modules() if isinstance(module, DoraExperts)]
    assert len(layers) == 4
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "router" in name)


@of_mixtures
def test_d10_merged_model_does_what_it_did(name: str) -> None:
    """But for roundings; its own fast kernels then compute it, under its own names."""
    model = mixtures.build(name)
    want = model(IDS).logits

    merge_adapter(model)

    assert (model(IDS).logits - want).abs().max() < 1e-4 * want.abs().max()
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in mixtures.plain(name).named_parameters()}


@pytest.mark.parametrize("nested", [True, False])
def test_q4_an_expert_decoded_by_itself_has_the_bits_of_the_whole(nested: bool) -> None:
    """Its absmax begin amid a nested block: 3 x 64 numbers are 3 of 256."""
    W = torch.randn(200, 24, 8, generator=torch.Generator().manual_seed(0))
    stored, state, packed = quant.quantize(W, QuantConfig(nested=nested), name="W")
    whole = quant.decode(stored, state, packed, dtype=torch.float32)

    for index in (0, 1, 85, 86, 199):
        part = quant.bytes_of_matrix(stored, packed, index=index)
        got = quant.decode_matrix(part, state, packed, index=index, dtype=torch.float32)
        assert torch.equal(got, whole[index])


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_d6_packed_experts_compute_what_their_decoded_weights_do(name: str) -> None:
    """A plain model of the decoded stacks has the same logits, to the bit."""
    config = DoraConfig(2, 4, target_modules=(), target_parameters=STACKS, quant="nf4")
    model = apply_dora(mixtures.plain(name), config)
    plain = mixtures.plain(name)
    plain.config._experts_implementation = "eager"
    with torch.no_grad():
        for parameter_name, layer in model.named_modules():
            if isinstance(layer, DoraExperts):
                W = layer.base.decode(layer.base.weight, dtype=torch.float32)
                plain.get_parameter(parameter_name).copy_(W.mT if layer.transposed else W)

    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    assert model.model.layers[0].mlp.experts.gate_up_proj.base.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("method", ["dora", "lora"])
@of_mixtures
def test_c1_experts_load_as_they_were_saved(tmp_path: Path, name: str, method: str) -> None:
    """Bit for bit."""
    model = mixtures.build(name, method=method)
    save_adapter(model, tmp_path)

    got = load_adapter(mixtures.plain(name), tmp_path)

    want = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in got.named_parameters() if p.requires_grad} == want.keys()
    assert all(torch.equal(got.get_parameter(n), p) for n, p in want.items())


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_c1_peft_reads_lora_on_experts_that_we_wrote(tmp_path: Path, name: str) -> None:
    """Peft's own loader computes our logits: names, order of the wrappers, order of B's columns."""
    model = mixtures.build(name, method="lora")
    save_adapter(model, tmp_path)

    theirs = peft.PeftModel.from_pretrained(mixtures.plain(name), tmp_path)

    want = model(IDS).logits
    assert (theirs(IDS).logits - want).abs().max() < 1e-5 * want.abs().max()
    assert (mixtures.plain(name)(IDS).logits - want).abs().max() > 1e-2 * want.abs().max()


def test_c1_we_read_lora_on_experts_that_peft_wrote(tmp_path: Path) -> None:
    """B != 0 on every expert."""
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"], target_parameters=list(STACKS))
    theirs = peft.get_peft_model(mixtures.plain("qwen3-moe"), config)
    with torch.no_grad():
        for parameter_name, parameter in theirs.named_parameters():
            if "lora" in parameter_name:
                parameter.normal_(std=0.2)
    theirs.save_pretrained(tmp_path)

    got = load_adapter(mixtures.plain("qwen3-moe"), tmp_path)(IDS).logits

    want = theirs(IDS).logits
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


def test_c1_save_says_that_peft_has_no_dora_on_experts(tmp_path: Path) -> None:
    """By name."""
    with pytest.warns(UserWarning, match=r"peft has no DoRA on .*experts\.gate_up_proj"):
        save_adapter(mixtures.build("mixtral"), tmp_path)


def test_all_linear_says_what_it_leaves() -> None:
    """One line, with the option that takes them; none where they are taken."""
    with pytest.warns(
        UserWarning, match=r'"all-linear" leaves 4 stacks of experts .*\[\'down_proj\', \'gate_up_proj\'\]'
    ):
        apply_dora(mixtures.plain("mixtral"), DoraConfig(2, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_dora(mixtures.plain("mixtral"), DoraConfig(2, 4, target_parameters=STACKS))


class Batched(Experts):
    """Takes all experts' matrices in one product."""

    def forward(self, x: Tensor, visits: list[int]) -> Tensor:
        """Of the weights of all visits."""
        return torch.bmm(self.up_proj[torch.tensor(visits)], x[:, :, None])[:, :, 0]


class Asking(Experts):
    """Reads its weight's dtype."""

    def forward(self, x: Tensor, visits: list[int]) -> Tensor:
        """As a layer would that casts its input."""
        return super().forward(x.to(self.up_proj.dtype), visits)


class Scaled(Experts):
    """Multiplies a matrix by a number."""

    def forward(self, x: Tensor, visits: list[int]) -> Tensor:
        """2 W."""
        del visits
        return functional.linear(x, torch.mul(self.up_proj[0], 2))


@pytest.mark.parametrize(
    ("kind", "what"),
    [(Batched, r"takes \(7,\) experts at once"), (Asking, "asks its weight for dtype"), (Scaled, "uses mul")],
)
def test_a_forward_that_does_more_is_refused(kind: type[Experts], what: str) -> None:
    """In one line, at the first forward, and the module is as before."""
    it = lattice(transposed=False)
    model = nn.Sequential(kind(it.W, transposed=False))
    apply_dora(model, DoraConfig(R, 1, target_modules=(), target_parameters=["up_proj"]))

    with pytest.raises(TargetError, match=what):
        model[0](it.x, VISITS)

    assert isinstance(model[0].up_proj, DoraExperts)


REFUSED: dict[str, tuple[dict[str, object], type[DoraError], str]] = {
    "router": ({"target_parameters": ["gate.weight"]}, TargetError, "a parameter of a MixtralTopKRouter"),
    "router-as-module": ({"target_modules": ["gate"]}, TargetError, "is a MixtralTopKRouter"),
    "layer": ({"target_parameters": ["q_proj.weight"]}, TargetError, "a parameter of a Linear"),
    "nothing": ({"target_modules": (), "target_parameters": ["typo"]}, TargetError, r"\['typo'\] match nothing"),
    "text": ({"target_parameters": "down_proj"}, TargetError, "the text 'down_proj'"),
    "rank": ({"target_modules": (), "target_parameters": STACKS, "rank": 60}, RankError, "one of 5 experts"),
    "blocks": (
        {"target_parameters": STACKS, "quant": QuantConfig(blocksize=256)}, StorageError, "has 384 numbers, no whole"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_stack_of_experts_is_refused(name: str) -> None:
    """By name, before anything is changed."""
    options, error, what = REFUSED[name]
    model = mixtures.plain("mixtral")
    before = str(model)

    with pytest.raises(error, match=what):
        apply_dora(model, DoraConfig(**({"rank": 2, "alpha": 4, "target_modules": ["q_proj"]} | options)))

    assert str(model) == before


@pytest.mark.parametrize("quant", [None, "nf4"])
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_s7_planned_units_are_those_of_the_adapted_model(name: str, quant: str | None) -> None:
    """Members, shapes and dtypes, in the order of registration."""
    config = DoraConfig(2, 4, target_modules=["q_proj"], target_parameters=STACKS, quant=quant)
    for units in ("block", "layer"):
        shard = ShardConfig("fsdp2", units=units)
        planned = plan_units(mixtures.plain(name), shard, config)

        live = plan_units(apply_dora(mixtures.plain(name), config), shard)

        assert planned.trainable == live.trainable
        assert planned.total == live.total
        assert [(u.name, u.rule, u.members) for u in planned.units] == [(u.name, u.rule, u.members) for u in live.units]


def test_streamed_weights_make_the_model_that_apply_dora_makes(tmp_path: Path) -> None:
    """From a checkpoint that holds the stacks as the model does (gpt-oss), tensor by tensor."""
    mixtures.plain("gpt-oss").save_pretrained(tmp_path)
    config = DoraConfig(2, 4, target_modules=["q_proj"], target_parameters=STACKS, quant="nf4")
    torch.manual_seed(1)
    want = apply_dora(AutoModelForCausalLM.from_pretrained(tmp_path).train(), config)

    torch.manual_seed(1)
    got = materialize(tmp_path, config)

    assert torch.equal(got(IDS).logits, want(IDS).logits)
    for name, parameter in want.named_parameters():  # packed bytes may read as NaN
        assert torch.equal(got.get_parameter(name).view(torch.uint8), parameter.view(torch.uint8)), name
