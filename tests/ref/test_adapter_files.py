"""Clause C1: PEFT reads what is written here, and what PEFT writes is read here; what is wrong loads nothing."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file

from ref import adapter_files, dora
from ref.adapter_files import AdapterConfig, AdapterMismatch
from ref.types import Adapter

RANK, ALPHA = 2, 3
CONFIG = AdapterConfig(RANK, float(ALPHA))


class Net(torch.nn.Module):
    """Three layers of different kinds, with fixed weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(4, 6)
        self.conv = torch.nn.Conv2d(3, 5, 2)
        self.table = torch.nn.Embedding(7, 4)

    def forward(self, ids, image):
        """Something that depends on all of them."""
        return self.first(self.table(ids)).sum() + self.conv(image).sum()


INPUTS = (torch.tensor([1, 5]), torch.linspace(-1, 1, 27).reshape(1, 3, 3, 3))


def peft_model(**changes):
    """Peft's DoRA on all three, with numbers in its factors."""
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=["first", "conv", "table"], use_dora=True, lora_dropout=0.0, **changes
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(Net(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    return model


def adapters(**changes):
    """Of the linear layer and the convolution, with Gaussian numbers."""
    random = np.random.default_rng(0)
    shapes = {"first": ((RANK, 4), (6, RANK)), "conv": ((RANK, 3, 2, 2), (5, RANK, 1, 1))}
    made = {
        name: Adapter(*(jnp.asarray(random.normal(size=s), jnp.float32) for s in (A, B, B[:1])))
        for name, (A, B) in shapes.items()
    }
    return made | changes


def assert_same(got, want):
    """The same layers with the same bits."""
    assert set(got) == set(want)
    for name, adapter in want.items():
        for a, b in zip(jax.tree.leaves(got[name]), jax.tree.leaves(adapter), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("rank_stabilized", [False, True], ids=["plain", "rank-stabilised"])
def test_c1_reads_what_peft_writes(tmp_path, rank_stabilized):
    """Linear, convolution and embedding: every number, the rank and the scaling are peft's."""
    model = peft_model(use_rslora=rank_stabilized)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path)

    got, config = adapter_files.read_adapter(tmp_path)

    inner = model.base_model.model
    assert set(got) == {"first", "conv", "table"}
    assert config.scaling == inner.first.scaling["default"]
    for name, factor in (("first", "lora_A"), ("conv", "lora_A")):
        layer = getattr(inner, name)
        np.testing.assert_array_equal(got[name].lora_A, getattr(layer, factor)["default"].weight.detach())
        np.testing.assert_array_equal(got[name].lora_B, layer.lora_B["default"].weight.detach())
    np.testing.assert_array_equal(got["table"].lora_A, inner.table.lora_embedding_A["default"].detach())
    for name in got:
        magnitude = getattr(inner, name).lora_magnitude_vector["default"].weight.detach().reshape(-1)
        np.testing.assert_array_equal(got[name].magnitude, magnitude)


def test_c1_peft_reads_what_is_written(tmp_path):
    """Peft loads the files with no key left over, and its factors and magnitudes are ours."""
    adapter_files.write_adapter(tmp_path, adapters(), CONFIG)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inner = PeftModel.from_pretrained(Net(), tmp_path).base_model.model

    for name, adapter in adapters().items():
        layer = getattr(inner, name)
        np.testing.assert_array_equal(layer.lora_A["default"].weight.detach(), adapter.lora_A)
        np.testing.assert_array_equal(layer.lora_B["default"].weight.detach(), adapter.lora_B)
        magnitude = layer.lora_magnitude_vector["default"].weight.detach().reshape(-1)
        np.testing.assert_array_equal(magnitude, adapter.magnitude)
        assert layer.scaling["default"] == dora.scaling(float(ALPHA), RANK)


def test_c1_reads_what_it_writes(tmp_path):
    """Every bit and the configuration come back, from a folder that was there or is made."""
    for folder in (tmp_path / "new" / "folder", tmp_path / "new"):
        adapter_files.write_adapter(folder, adapters(), CONFIG)

    got, config = adapter_files.read_adapter(folder)

    assert_same(got, adapters())
    assert config == CONFIG


@pytest.mark.parametrize(
    "end",
    [
        *(".lora_magnitude_vector", ".lora_magnitude_vector.default.weight", ".lora_magnitude_vector.weight"),
        *(".magnitude", ".weight_m_wdecomp.weight", ".dora_scale"),
    ],
)
def test_c1_magnitudes_go_by_many_names(tmp_path, end):
    """Those of peft, torchtune, NVlabs and kohya are all read."""
    adapter_files.write_adapter(tmp_path, adapters(), CONFIG)
    found = load_file(tmp_path / adapter_files.WEIGHTS)
    renamed = {name.replace(".lora_magnitude_vector", end): array for name, array in found.items()}
    save_file(renamed, tmp_path / adapter_files.WEIGHTS)

    assert_same(adapter_files.read_adapter(tmp_path)[0], adapters())


def test_c1_what_a_configuration_leaves_out_is_the_default(tmp_path):
    """No word of biases, of a plain scaling or of the base model is read as peft would read it."""
    adapter_files.write_adapter(tmp_path, adapters(), CONFIG)
    path = tmp_path / adapter_files.CONFIG
    kept = {"peft_type", "use_dora", "r", "lora_alpha", "target_modules"}
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key in kept}))

    config = adapter_files.read_adapter(tmp_path)[1]

    assert config == adapter_files.AdapterConfig(CONFIG.rank, CONFIG.alpha, rank_stabilized=False, base_model=None)


def test_c1_every_fault_is_listed(tmp_path):
    """Missing, extra, misshapen: all stand in one error."""
    adapter_files.write_adapter(tmp_path, adapters(), CONFIG)
    path = tmp_path / adapter_files.WEIGHTS
    found = load_file(path)
    found.pop("base_model.model.first.lora_magnitude_vector")
    found["base_model.model.conv.lora_A.weight"] = np.ones((3, 3, 2, 2), np.float32)
    found["surplus"] = np.ones(1, np.float32)
    save_file(found, path)

    with pytest.raises(
        AdapterMismatch, match=r"surplus is no part.*first\.magnitude is missing.*conv\.lora_A has shape \(3, 3, 2, 2\)"
    ):
        adapter_files.read_adapter(tmp_path)


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "magnitude"])
def test_c1_each_part_has_its_shape(tmp_path, part):
    """A factor or a magnitude of another length is named with what was wanted."""
    adapter_files.write_adapter(tmp_path, adapters(), CONFIG)
    stored = f"base_model.model.first{adapter_files.SPELLINGS[part][0]}"
    found = load_file(tmp_path / adapter_files.WEIGHTS)
    found[stored] = found[stored][:-1].copy()
    save_file(found, tmp_path / adapter_files.WEIGHTS)

    with pytest.raises(AdapterMismatch, match=rf"first\.{part} has shape .* wanted"):
        adapter_files.read_adapter(tmp_path, shapes={"first": (6, 4), "conv": (5, 3, 2, 2)})


def test_c1_another_model_is_refused(tmp_path):
    """Layers without an adapter, adapters without a layer, and other widths are named."""
    adapter_files.write_adapter(tmp_path, adapters(), CONFIG)

    with pytest.raises(AdapterMismatch, match=r"last\.lora_A is missing.*conv is no layer.*first\.lora_A has"):
        adapter_files.read_adapter(tmp_path, shapes={"first": (6, 5), "last": (2, 2)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": False}, "no DoRA adapter"),
        *(({asked: {"first": 4}}, asked) for asked in ("rank_pattern", "alpha_pattern", "layer_replication")),
        *(({asked: ["first"]}, asked) for asked in ("modules_to_save", "lora_bias")),
        ({"bias": "all"}, "trains biases"),
        ({"r": None}, "cannot be read"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_c1_a_configuration_of_something_else_is_refused(tmp_path, change, said):
    """What it asks for and has no meaning here is named."""
    adapter_files.write_adapter(tmp_path, adapters(), CONFIG)
    path = tmp_path / adapter_files.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))

    with pytest.raises(AdapterMismatch, match=said):
        adapter_files.read_adapter(tmp_path)


def test_c1_ranks_that_differ_are_not_written(tmp_path):
    """An adapter of another rank than the configuration's is named, and nothing written."""
    odd = Adapter(jnp.ones((3, 4)), jnp.ones((6, 3)), jnp.ones(6))

    with pytest.raises(AdapterMismatch, match="first has rank 3"):
        adapter_files.write_adapter(tmp_path / "new", adapters(first=odd), CONFIG)

    assert not (tmp_path / "new").exists()


def test_c3_no_pickle_is_read(tmp_path):
    """A pickled adapter beside the configuration is not looked at."""
    adapter_files.write_adapter(tmp_path, adapters(), CONFIG)
    (tmp_path / adapter_files.WEIGHTS).rename(tmp_path / "adapter_model.bin")

    with pytest.raises(AdapterMismatch, match="cannot be read"):
        adapter_files.read_adapter(tmp_path)
