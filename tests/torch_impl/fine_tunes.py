"""One QDoRA fine-tune of a Llama three times: in JAX over four devices, in PyTorch, and in float64, the truth.

Axes: L layers, S blocks of a weight. All three begin with the same bits: PyTorch's packed base, which JAX makes as well
(given the offset that torch's sum came to, Q4, Q6), and PyTorch's first adapter, handed over in PEFT's files. A step is
README's: the gradient of the mean cross entropy, clipped by its global norm (S5, T2), then AdamW (T3).

How far a trajectory may lie off is the oracle's own `sensitivity`, here of a whole run: the float64 step is taken again
and again with noise of float32's unit roundoff behind each of its operations, those of clipping and AdamW included.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import Array
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, logging

from parity.models.pretrained import token_ids
from parity.oracle.sensitivity import noisy
from parity.oracle.weights import offset_and_bound
from ref import checkpoint, finetune, llama, mesh, quant, quant_fast, training
from ref.adapter_files import read_adapter
from ref.checkpoint import LlamaConfig, Parameters
from ref.encoders import PROFILES
from ref.types import Adapter, NestedState, PackedWeight, QuantState
from torch_impl import DoraConfig, DoraLinear, apply_dora

UNIT = 2.0**-24
"""The unit roundoff of float32."""
DEVICES = 4
TOKENS, STRIDE = 495, 97
"""Of the text; and how far one sequence begins after another, prime to the number of beginnings."""


@dataclass(frozen=True)
class Plan:
    """What all three do."""

    model: Path
    """A Llama in Hugging Face's format."""
    layers: int
    """How many of its first layers are run."""
    steps: int = 10
    sequences: int = 4
    """In a batch."""
    seq_len: int = 64
    """Tokens that are predicted in a sequence."""
    rank: int = 8
    alpha: float = 16.0
    lr: float = 1e-3
    max_norm: float = 1.0
    """What gradients are clipped to."""

    @property
    def scaling(self) -> float:
        """D1: s."""
        return self.alpha / self.rank

    def batches(self) -> NDArray[np.int64]:
        """Real text, (steps, sequences, seq_len + 1): no two sequences are alike."""
        ids, beginnings = token_ids(self.model, TOKENS), TOKENS - self.seq_len
        first = STRIDE * np.arange(self.steps * self.sequences) % beginnings
        windows = np.stack([ids[start : start + self.seq_len + 1] for start in first])
        return windows.reshape(self.steps, self.sequences, -1)


@dataclass(frozen=True)
class Trace:
    """What a run left."""

    losses: NDArray[np.float64]
    """Before each step."""
    adapter: Mapping[str, NDArray[Any]]
    """At the end, by "model.layers.0.mlp.up_proj.lora_A"."""


# --- PyTorch -------------------------------------------------------------------------------------------------------


def torch_model(plan: Plan) -> nn.Module:
    """Its first layers, frozen in nested NF4, with fresh adapters."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        plan.model, dtype=torch.float32, num_hidden_layers=plan.layers, use_safetensors=True, local_files_only=True
    )
    model.config.use_cache = False
    torch.manual_seed(0)
    return apply_dora(model, DoraConfig(rank=plan.rank, alpha=plan.alpha, quant="nf4")).train()


def dora_layers(model: nn.Module) -> Iterator[tuple[str, DoraLinear]]:
    """The adapted layers by name."""
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, DoraLinear))


def torch_run(
    plan: Plan,
    model: nn.Module,
    *,
    batches: NDArray[np.int64] | None = None,
    adamw: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
) -> Trace:
    """Train the model, in place, in this one process.

    The loss is the suite's, and in float64: torch's float32 log-softmax would be the largest error of the network
    (`parity.implementations.torch_network` says how it comes about): on thirty layers its curve is off 3.3 x limit.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = adamw(trained, lr=plan.lr), []
    for batch in torch.from_numpy(plan.batches() if batches is None else batches):
        logits = model(input_ids=batch[:, :-1]).logits
        loss = functional.cross_entropy(logits.flatten(0, 1).double(), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, plan.max_norm)
        optimizer.step()
        losses.append(loss.item())
    return Trace(np.asarray(losses), torch_adapter(model))


def torch_adapter(model: nn.Module) -> dict[str, NDArray[np.float32]]:
    """A copy of every tensor that trains."""
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters() if p.requires_grad}


def torch_base(model: nn.Module) -> dict[str, PackedWeight]:
    """The packed weights, as JAX holds them."""

    def held(layer: DoraLinear) -> PackedWeight:
        base, form = layer.base, layer.base.format
        parts = {name: jnp.asarray(getattr(base, name).numpy()) for name in base.state_names}
        packed = base.weight.detach().view(torch.uint8).flatten()[: form.nbytes]
        nested = NestedState(
            absmax=parts["nested_absmax"],
            code=parts["nested_code"],
            offset=parts["nested_offset"].reshape(()),
            blocksize=form.nested_blocksize,
        )
        state = QuantState(parts["absmax"], parts["code"], nested, blocksize=form.blocksize, shape=form.shape)
        return PackedWeight(jnp.asarray(packed.numpy()), state)

    return {name: held(layer) for name, layer in dora_layers(model)}


# --- JAX -----------------------------------------------------------------------------------------------------------


def jax_base(plan: Plan, offsets: Mapping[str, float]) -> Parameters:
    """`finetune.quantised`, but that scales are coded with the offsets given: the mean as torch summed it (Q4, Q6)."""
    plain = finetune.quantised(
        checkpoint.read_checkpoint(plan.model, dtype="float32", layers=plan.layers), nested=False
    )

    def coded(name: str, leaf: Any) -> Any:
        if not isinstance(leaf, PackedWeight):
            return leaf
        given = [offsets[f"model.layers.{layer}.{name.removesuffix('.weight')}"] for layer in range(plan.layers)]
        scales = [
            quant.encode_scales(np.asarray(absmax_S), offset, PROFILES["bnb-cpu"])
            for absmax_S, offset in zip(leaf.state.absmax, given, strict=True)
        ]
        absmax, nested = jax.tree.map(lambda *each: jnp.stack(each), *scales)
        return PackedWeight(leaf.packed, replace(leaf.state, absmax=absmax, nested=nested))

    return replace(plain, layers={name: coded(name, leaf) for name, leaf in plain.layers.items()})


def base_faults(plan: Plan, frozen: Parameters, packed: Mapping[str, PackedWeight]) -> Iterator[str]:
    """Where JAX's bytes and quant states are not PyTorch's, bit for bit; and offsets that are no mean of the scales."""
    weights = checkpoint.by_name(checkpoint.read_checkpoint(plan.model, dtype="float32", layers=plan.layers))
    for name, want in packed.items():
        _, _, layer, projection = name.split(".", 3)
        got = jax.tree.map(lambda stacked, k=int(layer): stacked[k], frozen.layers[f"{projection}.weight"])
        pairs = zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True)
        unequal = [jax.tree_util.keystr(path) for (path, a), b in pairs if not _same_bits(a, b)]
        if unequal or jax.tree.structure(got) != jax.tree.structure(want):
            yield f"{name}: not the same bits: {', '.join(unequal) or 'the shape'}"
        mean, bound = offset_and_bound(np.asarray(weights[f"{name}.weight"]))
        if not abs(float(want.state.nested.offset) - mean) <= bound:
            yield f"{name}: an offset of {float(want.state.nested.offset)!r}, the scales' mean is {mean!r}"


def _same_bits(a: Array, b: Array) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def first_adapters(plan: Plan, folder: Path) -> dict[str, Adapter]:
    """PEFT's files, by projection, stacked along L."""
    found, config = read_adapter(folder)
    if config.scaling != plan.scaling:
        raise ValueError(f"the files say a scaling of {config.scaling}, the plan {plan.scaling}")
    projections = [name.removeprefix("model.layers.0.") for name in found if name.startswith("model.layers.0.")]
    return {
        projection: jax.tree.map(
            lambda *each: jnp.stack(each),
            *(found[f"model.layers.{layer}.{projection}"] for layer in range(plan.layers)),
        )
        for projection in projections
    }


def stepper(plan: Plan, gathered: Callable[[Any], Any] = lambda adapters: adapters) -> Callable[..., Any]:
    """README's step, before it is jitted: (adapters, state, frozen, batch) to the first two again, and the loss."""
    config = LlamaConfig.from_json(plan.model / "config.json")

    def step(adapters: Any, state: Any, frozen: Parameters, batch: Array) -> Any:
        def loss(adapters: Any) -> Array:
            options = {"adapters": gathered(adapters), "scaling": plan.scaling}
            return llama.loss(frozen, batch[:, :-1], batch[:, 1:], config, **options)

        value, gradients = jax.value_and_grad(loss)(adapters)
        gradients, _ = training.clip(gradients, max_norm=plan.max_norm)
        return *training.adamw(adapters, gradients, state, lr=plan.lr), value

    return step


def jax_run(plan: Plan, frozen: Parameters, adapters: Mapping[str, Adapter]) -> Trace:
    """Everything dealt over four devices, in float32, as README's script has it."""
    on = mesh.make_mesh(shard=DEVICES)
    frozen, adapters = finetune.cut(frozen, on), finetune.cut(adapters, on)
    state = finetune.cut(training.adam_start(adapters), on)
    where = jax.tree.map(lambda array: array.sharding, (adapters, state))
    step = stepper(plan, gathered=lambda adapters: finetune.gathered(adapters, on))
    return _run(plan, jax.jit(step, out_shardings=(*where, None), donate_argnums=(0, 1)), frozen, (adapters, state))


def _run(plan: Plan, step: Callable[..., Any], frozen: Parameters, held: tuple[Any, Any]) -> Trace:
    losses = []
    for batch in plan.batches():
        *held, value = step(*held, frozen, jnp.asarray(batch))
        losses.append(float(value))
    adapter = {
        f"{name}.{part}": np.asarray(array)
        for name, found in finetune.by_layer(held[0]).items()
        for part, array in vars(found).items()
    }
    return Trace(np.asarray(losses), adapter)


# --- float64 -------------------------------------------------------------------------------------------------------


def truths(plan: Plan, frozen: Parameters, adapters: Mapping[str, Adapter], *, seeds: int) -> Iterator[Trace]:
    """From the decoded weights, on one device: first exact, then with noise like float32's rounding, a run a seed."""
    parameters, first = jax.tree.map(lambda array: array.astype(jnp.float64), (decoded(frozen), dict(adapters)))
    yield _run(plan, jax.jit(stepper(plan)), parameters, (first, training.adam_start(first)))
    step = jax.jit(noisy(stepper(plan), unit=UNIT))
    for seed in range(seeds):
        keys = iter(jax.random.split(jax.random.key(seed), plan.steps))
        moved = lambda *arguments, keys=keys: step(next(keys), *arguments)  # noqa: E731 - of this seed
        yield _run(plan, moved, parameters, (first, training.adam_start(first)))


def decoded(frozen: Parameters) -> Parameters:
    """Q4: with the float32 weights that the bytes stand for."""

    def plain(leaf: Any) -> Any:
        return jax.lax.map(lambda one: quant_fast.decode(*one), leaf) if isinstance(leaf, PackedWeight) else leaf

    return replace(frozen, layers={name: plain(leaf) for name, leaf in frozen.layers.items()})
