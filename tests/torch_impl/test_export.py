"""D10, C1, S12: `merge` writes a plain checkpoint with the adapter's logits; `export` an adapter from a checkpoint."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from torch_impl import DoraConfig, apply_dora, load_adapter, save_adapter
from torch_impl.errors import AdapterFileError, CheckpointError, OptionError
from torch_impl.files import checkpoint
from torch_impl.training.export import ExportOptions, MergeOptions, export, merge

NEAR = 2.0**-18
"""Of the largest logit: some 32 float32 roundings, where two blocks round each logit differently."""
CONFIG = {"rank": 3, "alpha": 6.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama as a Hugging Face checkpoint."""
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=67,
        hidden_size=48,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def load(folder: Path) -> nn.Module:
    """What transformers makes of a folder."""
    return AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)


def adapted(base: Path, **config: Any) -> nn.Module:
    """The model with adapters that are off their start."""
    torch.manual_seed(5)
    model = apply_dora(load(base), DoraConfig(**(CONFIG | config)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1 + 0.1 * torch.rand_like(parameter)).add_(0.02 * torch.randn_like(parameter))
    return model


def logits(model: nn.Module) -> Tensor:
    """Logits of two short texts."""
    tokens = torch.randint(0, 67, (2, 13), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(input_ids=tokens).logits


@pytest.mark.parametrize("method", ["dora", "lora"])
@pytest.mark.parametrize("quant", [None, "nf4"])
def test_d10_transformers_gives_the_adapter_models_logits(
    base: Path, tmp_path: Path, quant: str | None, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The merged folder, loaded by transformers alone, gives the adapter model's logits; the precision is said."""
    model = adapted(base, quant=quant, method=method)
    want = logits(model)
    save_adapter(model, tmp_path / "adapter")

    merge(MergeOptions(base, tmp_path / "adapter", tmp_path / "merged", quant=quant or "none"))

    merged = load(tmp_path / "merged")
    assert float((logits(merged) - want).abs().max()) <= NEAR * float(want.abs().max())
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert ("dequantised from nf4" in capsys.readouterr().out) == (quant == "nf4")


def test_d10_merge_is_far_from_the_base_model(base: Path) -> None:
    """The test above could fail: the adapter moves the logits by far more than its limit."""
    model = adapted(base)

    assert float((logits(model) - logits(load(base))).abs().max()) > 1000 * NEAR * float(logits(model).abs().max())


def test_c1_the_adapter_names_its_base_model(base: Path, tmp_path: Path) -> None:
    """Peft's AutoPeftModel finds the base model by this name."""
    save_adapter(adapted(base), tmp_path / "adapter")

    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())

    assert config["base_model_name_or_path"] == str(base)


def test_merge_overwrites_nothing(base: Path, tmp_path: Path) -> None:
    """An output that exists is refused before anything loads."""
    with pytest.raises(OptionError, match="exists"):
        merge(MergeOptions(base, base, tmp_path))


def test_merge_leaves_nothing_behind_when_the_adapter_is_another_models(base: Path, tmp_path: Path) -> None:
    """A damaged adapter is refused from the skeleton, and no file is left."""
    save_adapter(adapted(base), tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"")

    with pytest.raises(AdapterFileError):
        merge(MergeOptions(base, tmp_path / "adapter", tmp_path / "merged"))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def checkpointed(base: Path, run: Path, method: str) -> nn.Module:
    """A model whose checkpoint of step 3 lies under `run`."""
    model = adapted(base, method=method)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    logits_sum = model(input_ids=torch.arange(12)[None]).logits.square().mean()
    logits_sum.backward()
    optimizer.step()
    options = CONFIG | {"method": method, "target_modules": "all-linear", "model": str(base)}  # of an older version
    checkpoint.save(run / "checkpoints", model, optimizer, checkpoint.Saved(3, 6, {"options": options}))
    return model


@pytest.mark.parametrize("method", ["dora", "lora"])
def test_s12_export_gives_the_checkpoints_adapter(base: Path, tmp_path: Path, method: str) -> None:
    """What export writes loads as the model that was saved, bit for bit."""
    want = {n: p for n, p in checkpointed(base, tmp_path, method).named_parameters() if p.requires_grad}

    export(ExportOptions(tmp_path, tmp_path / "adapter"))

    got = {n: p for n, p in load_adapter(load(base), tmp_path / "adapter").named_parameters() if p.requires_grad}
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        base
    )
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_c1_peft_reads_what_was_exported(base: Path, tmp_path: Path) -> None:
    """Peft's own loader gives the saved model's logits."""
    want = logits(checkpointed(base, tmp_path, "dora"))

    export(ExportOptions(tmp_path, tmp_path / "adapter", step=3))

    theirs = peft.PeftModel.from_pretrained(load(base), tmp_path / "adapter")
    assert float((logits(theirs) - want).abs().max()) <= NEAR * float(want.abs().max())


def test_export_overwrites_no_adapter(base: Path, tmp_path: Path) -> None:
    """A folder that holds one is refused."""
    checkpointed(base, tmp_path, "dora")
    export(ExportOptions(tmp_path, tmp_path / "adapter"))

    with pytest.raises(OptionError, match=r"adapter: adapter_model\.safetensors exists"):
        export(ExportOptions(tmp_path, tmp_path / "adapter", step=3))


def test_merge_where_nothing_can_be_written_is_one_line(base: Path, tmp_path: Path) -> None:
    """A place below a file is named."""
    save_adapter(adapted(base), tmp_path / "adapter")

    with pytest.raises(OptionError, match="can't be written"):
        merge(MergeOptions(base, tmp_path / "adapter", base / "config.json" / "merged"))


def test_export_of_a_step_that_is_not_there_says_which_are(base: Path, tmp_path: Path) -> None:
    """One line that names what the folder holds."""
    checkpointed(base, tmp_path, "dora")

    with pytest.raises(CheckpointError, match=r"step-000003"):
        export(ExportOptions(tmp_path, tmp_path / "adapter", step=4))
