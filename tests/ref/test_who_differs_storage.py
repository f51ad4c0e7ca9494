"""What SPEC.md says of peft and bitsandbytes under `Differs`, on packed weights and in files, by running them.

As in `test_who_differs`: where one of these fails, the other project has changed, and SPEC.md is to be corrected.
"""

import warnings

import bitsandbytes as bnb
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from ref import adapter_files, dora, quant
from ref.adapter_files import AdapterMismatch
from ref.quant import QuantizationError
from ref.types import Adapter

RANK = 2
S = 0.5
OUT, IN = 16, 64


def normal(*shape, seed):
    """Fixed Gaussian numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def array(tensor):
    """The same numbers for JAX."""
    return jnp.asarray(tensor.detach().numpy())


def far(got, want):
    """How far apart, of the whole."""
    got, want = np.asarray(got), np.asarray(want)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def adapted(module):
    """The module in peft's DoRA: the model, and its one adapted layer."""
    config = LoraConfig(r=RANK, lora_alpha=S * RANK, target_modules=["0"], use_dora=True)
    base = nn.Sequential(module)
    base.is_loaded_in_4bit = isinstance(
        module, bnb.nn.Linear4bit
    )  # as transformers says it; else peft takes its plain layer
    model = get_peft_model(base, config).train()
    return model, model.base_model.model[0]


def packed(*, compute):
    """Peft's QDoRA over a float32 weight in NF4, computed in the given dtype; and that weight as it decodes."""
    module = bnb.nn.Linear4bit(IN, OUT, bias=False, compute_dtype=compute, quant_type="nf4")
    module.weight = bnb.nn.Params4bit(normal(OUT, IN, seed=1), requires_grad=False, quant_type="nf4")
    module.to("cpu")  # packs
    return *adapted(module), bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)


# --- packed weights ------------------------------------------------------------------------------------------------


def test_d6_pefts_magnitude_under_qdora_is_of_the_uncast_weight():
    """Peft decodes, as it should, but does not cast: the product takes bfloat16's weight, the magnitude float32's."""
    _, layer, W = packed(compute=torch.bfloat16)
    m = layer.lora_magnitude_vector["default"].weight.detach()
    A, B = jnp.zeros((RANK, IN), jnp.float32), jnp.zeros((OUT, RANK), jnp.float32)

    uncast = dora.initial_magnitude(array(W), A, B, scaling=S)
    used = dora.initial_magnitude(array(W.bfloat16().float()), A, B, scaling=S)
    unpacked = dora.initial_magnitude(array(normal(OUT, IN, seed=1)), A, B, scaling=S)

    assert far(m, uncast) < 16 * 2.0**-24
    assert far(m, used) > 2.0**-16
    assert far(m, unpacked) > 2.0**-10


def test_d10_peft_merges_into_a_packed_base_by_coding_again():
    """What peft merged is NF4 once more, off by the coding error; the reference's merged weight is plain."""
    _, layer, W = packed(compute=torch.float32)
    A, B, m = normal(RANK, IN, seed=2), normal(OUT, RANK, seed=3), normal(OUT, seed=4).abs() + 0.5
    layer.lora_A["default"].weight.data = A
    layer.lora_B["default"].weight.data = B
    layer.lora_magnitude_vector["default"].weight.data = m

    with pytest.warns(UserWarning, match="rounding errors"):
        layer.merge()

    want = dora.merge(array(W), Adapter(array(A), array(B), array(m)), scaling=S)
    got = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert type(layer.weight) is bnb.nn.Params4bit
    assert 0.05 < far(got, want) < 0.15


@pytest.mark.parametrize(("nested", "poisoned"), [(False, 64), (True, OUT * IN)], ids=["plain", "nested"])
def test_q7_bitsandbytes_encodes_a_nan_without_a_word(nested, poisoned):
    """One NaN spoils its block, nested the whole tensor, and nothing is said; the reference refuses it."""
    W = normal(OUT, IN, seed=1)
    W[3, 5] = torch.nan

    codes, state = bnb.functional.quantize_4bit(W, blocksize=64, quant_type="nf4", compress_statistics=nested)

    assert bnb.functional.dequantize_4bit(codes, state).isnan().sum() == poisoned
    with pytest.raises(QuantizationError):
        quant.encode(W.numpy(), nested=nested)


def test_q3_bitsandbytes_raises_where_bytes_do_not_divide():
    """66 elements, 33 bytes, are no whole number of bfloat16s; the storage of torch_impl pads them."""
    with pytest.raises(RuntimeError, match="33"):
        bnb.functional.quantize_4bit(normal(1, 66, seed=1), quant_type="nf4", quant_storage=torch.bfloat16)


# --- files ---------------------------------------------------------------------------------------------------------


def saved(directory):
    """A trained adapter of peft, in its two files, and its magnitude."""
    model, layer = adapted(plain())
    layer.lora_magnitude_vector["default"].weight.data += 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(directory)
    return layer.lora_magnitude_vector["default"].weight.detach()


def plain():
    """The layer underneath."""
    module = nn.Linear(IN, OUT)
    module.weight.data = normal(OUT, IN, seed=1)
    return module


def test_c1_peft_loads_an_adapter_that_lacks_its_magnitudes(tmp_path):
    """Peft warns and trains on from the base weight's norms; the reference names what is missing and loads nothing."""
    lost = saved(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "magnitude" not in name}
    save_file(kept, tmp_path / "adapter_model.safetensors")

    with pytest.warns(UserWarning, match="missing adapter keys"):
        model = PeftModel.from_pretrained(nn.Sequential(plain()), tmp_path)

    m = model.base_model.model[0].lora_magnitude_vector["default"].weight.detach()
    assert len(kept) == len(tensors) - 1
    assert far(m, lost - 1) < 16 * 2.0**-24
    with pytest.raises(AdapterMismatch, match="magnitude"):
        adapter_files.read_adapter(tmp_path)


def test_c3_peft_reads_a_pickle(tmp_path):
    """Where the safetensors file is absent, peft unpickles `adapter_model.bin`; the reference does not look at it."""
    m = saved(tmp_path)
    torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(nn.Sequential(plain()), tmp_path)

    assert torch.equal(model.base_model.model[0].lora_magnitude_vector["default"].weight, m)
    with pytest.raises(AdapterMismatch, match="cannot be read"):
        adapter_files.read_adapter(tmp_path)
