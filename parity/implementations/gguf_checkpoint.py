"""A GGUF file of a Llama, read by transformers and written again as a plain Hugging Face checkpoint.

Run as a process of its own, ``python -m parity.implementations.gguf_checkpoint GGUF OUT``, so that the suite itself
loads neither torch nor transformers to obtain the pretrained model. OUT then holds `config.json`, `model.safetensors`
(float32, each block of the GGUF decoded, and no trace of a quantiser) and `tokenizer.json`.
"""

import json
import sys
from pathlib import Path
from typing import Any

ARGUMENTS = 2  # GGUF, OUT


def main(arguments: list[str]) -> int:
    """Convert GGUF into OUT, which must be an existing directory; the exit status says whether it was done."""
    if len(arguments) != ARGUMENTS:
        sys.stderr.write("usage: python -m parity.implementations.gguf_checkpoint GGUF OUT\n")
        return 2
    convert(Path(arguments[0]), Path(arguments[1]))
    return 0


def convert(gguf: Path, out: Path) -> None:
    """Write the model and the tokenizer of `gguf` into `out`, in float32 and in safetensors only."""
    import torch  # noqa: PLC0415 - heavy, and only this conversion needs it
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415 - likewise

    where = {"gguf_file": gguf.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **where)
    write_weights(model, out / "model.safetensors")
    write_configuration(model.config.to_dict(), out / "config.json")
    AutoTokenizer.from_pretrained(gguf.parent, **where).save_pretrained(out)


def write_weights(model: Any, path: Path) -> None:
    """Every parameter once, under its own name: a tied output embedding is left to the configuration."""
    from safetensors.torch import save_file  # noqa: PLC0415 - brings torch

    weights = {name: tensor.detach().contiguous() for name, tensor in model.named_parameters()}
    bad = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if bad:
        raise ValueError(f"{bad[0]} holds a value that is not finite: the GGUF file is damaged")
    save_file(weights, path, metadata={"format": "pt"})


def write_configuration(configuration: dict[str, Any], path: Path) -> None:
    """The model's own configuration, without the quantiser it came through and without the place it came from."""
    kept = {k: v for k, v in configuration.items() if k != "quantization_config" and not k.startswith("_")}
    kept["architectures"] = ["LlamaForCausalLM"]
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
