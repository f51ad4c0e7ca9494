"""What a user declares: the adapter (`DoraConfig`), the four-bit storage (`QuantConfig`), the sharding (`ShardConfig`).

Clauses: D1 scaling, D9 dropout, D11 dtypes, Q1 and Q3 storage, S6, S7, S10. All are frozen, and refuse bad values.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from torch_impl.errors import DtypeError, OptionError, RankError, ScalingError, ShardingError, StorageError, TargetError
from torch_impl.strategies import STRATEGIES, Strategy, StrategyName

ALL_LINEAR = "all-linear"
Method = Literal["dora", "lora"]
Units = Literal["block", "layer"]
COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # those that the four-bit decoder writes, too
STORAGE_DTYPES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class QuantConfig:
    """Q1 to Q3: how a base weight is stored in four bits, in bitsandbytes' format.

    Raises:
        StorageError: a code, blocksize or storage dtype that bitsandbytes doesn't have.
    """

    quant_type: Literal["nf4", "fp4"] = "nf4"
    """The codebook (Q2)."""
    blocksize: int = 64
    """Elements that share one absmax (Q1)."""
    nested: bool = True
    """Whether the absmax are themselves stored in eight bits (Q6), as QLoRA has it."""
    quant_storage: torch.dtype = torch.bfloat16
    """The dtype the packed bytes are viewed as (Q3): a floating one, so that a flat parameter may hold them (S7)."""

    def __post_init__(self) -> None:
        if self.quant_type not in ("nf4", "fp4"):
            raise StorageError(f"quant_type {self.quant_type!r} is not supported", hint='use "nf4" or "fp4"')
        if self.blocksize not in BLOCKSIZES:
            raise StorageError(
                f"blocksize {self.blocksize} is not one of bitsandbytes'", hint=f"use one of {BLOCKSIZES}"
            )
        if self.quant_storage not in STORAGE_DTYPES:
            raise StorageError(
                f"quant_storage {self.quant_storage} can't hold packed bytes", hint=f"use one of {STORAGE_DTYPES}"
            )


@dataclass(frozen=True)
class DoraConfig:
    """What `apply_dora` puts on a model.

    Raises:
        RankError: `rank` is no integer, or below 1.
        ScalingError: `alpha` is 0, NaN or infinite.
        TargetError: `target_modules` is empty.
        DtypeError: `compute_dtype` is none that a layer can multiply in.
        StorageError: `quant` is no name that is known.
        OptionError: `method` is neither `dora` nor `lora`, or `dropout` is no probability below 1.
    """

    rank: int
    """r, the inner size of B A."""
    alpha: float
    """The numerator of the scaling (D1)."""
    target_modules: str | Collection[str] = ALL_LINEAR
    """`"all-linear"`, a regular expression for whole names, or names and their endings (as PEFT reads them)."""
    target_parameters: Collection[str] = ()
    """D16: names, or their endings, of parameters that hold a stack of experts' matrices, as PEFT names them."""
    quant: Literal["nf4"] | QuantConfig | None = None
    """How the base weights are stored: as they are, `"nf4"` (nested), or as a `QuantConfig` says."""
    rank_stabilized: bool = False
    """Whether s divides by sqrt(r) instead of r (D1)."""
    compute_dtype: torch.dtype | None = None
    """What the layer multiplies in; None is the dtype of the base layer's weight before it was packed."""
    dropout: float = 0.0
    """D9, PEFT's `lora_dropout`: the share of the input that the adapter doesn't see while training."""
    method: Method = "dora"
    """`lora` leaves the magnitude out: y = x (W + s B A)' + b, in the same units and under the same names."""

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise RankError(f"rank {self.rank!r} is not a positive integer", hint="use rank=8, say")
        if not isinstance(self.alpha, int | float) or not math.isfinite(self.alpha) or self.alpha == 0:
            raise ScalingError(
                f"alpha {self.alpha!r} gives no usable scaling", hint="use a finite alpha other than 0, say 2 * rank"
            )
        if isinstance(self.target_parameters, str):
            raise TargetError(
                f"target_parameters is the text {self.target_parameters!r}", hint="give a list of names or endings"
            )
        if not self.target_modules and not self.target_parameters:
            raise TargetError("target_modules is empty", hint='name modules, or use "all-linear"')
        if self.compute_dtype is not None and self.compute_dtype not in COMPUTE_DTYPES:
            raise DtypeError(
                f"compute_dtype {self.compute_dtype} is not supported", hint=f"use None or one of {COMPUTE_DTYPES}"
            )
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise OptionError(
                f"dropout {self.dropout!r} is no probability below 1", hint="use 0.05, say; 0 drops nothing"
            )
        if isinstance(self.quant, str) and self.quant != "nf4":
            raise StorageError(f"quant {self.quant!r} is unknown", hint='use None, "nf4" or a QuantConfig')
        if self.method not in get_args(Method):
            raise OptionError(f"method {self.method!r} is unknown", hint="use dora or lora")

    @property
    def scaling(self) -> float:
        """D1: s = alpha / r, or alpha / sqrt(r) when rank-stabilised."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    @property
    def quant_config(self) -> QuantConfig | None:
        """The storage in full: `"nf4"` is `QuantConfig()`."""
        return QuantConfig() if self.quant == "nf4" else self.quant


@dataclass(frozen=True)
class ShardConfig:
    """How `shard_model` cuts a model; the units are S7's (see `torch_impl.sharding.apply`).

    Raises:
        ShardingError: an unknown strategy.
        DtypeError: a `param_dtype` or `reduce_dtype` that is no floating dtype.
    """

    strategy: StrategyName = "fsdp2"
    """`fsdp1` is torch's FSDP, `fsdp1-orig` the same with `use_orig_params=True`, `fsdp2` is `fully_shard`, `hsdp` is
    `fully_shard` on a mesh of replicas and shards and `fsdp1-hybrid` is fsdp1's HYBRID_SHARD (S9), `ddp` replicates,
    `tp` cuts features over all ranks and `fsdp2-tp` over each row of a mesh, whose columns are fsdp2's (S10), `none`
    leaves the model as it is."""
    param_dtype: torch.dtype | None = None
    """What dense weights, norms and embeddings are gathered as; never adapters (D11), never packed bytes (S6)."""
    reduce_dtype: torch.dtype | None = None
    """What gradients of anything but adapters are reduced in; adapters reduce in float32 (D11), and so does whatever
    else trains in a block that is one unit with them."""
    shard_size: int | None = None
    """`hsdp` and `fsdp1-hybrid`: ranks that share one copy; None is half of the world, or all of an odd one."""
    reshard_after_forward: bool = True
    """Whether what was gathered for the forward is freed after it, and gathered again in the backward pass."""
    cpu_offload: bool = False
    """`fsdp2` and `hsdp` on GPUs: shards stay in host memory between uses."""
    units: Units | None = None
    """What is gathered together (S7): a `block` as a whole, or each `layer`'s base, bias and adapter by themselves.
    None is `block` under `fsdp2` and `hsdp`, and `layer` under FSDP1."""
    tensor_size: int | None = None
    """`fsdp2-tp`: ranks that share each layer's features, neighbours in rank; `tp` has all."""
    tensor_plan: Mapping[str, str] | None = None
    """`tp` and `fsdp2-tp`: a style for each layer, by name or pattern (see `torch_impl.sharding.tensor_parallel`); it
    counts beside the model's own `tp_plan`, which transformers' have, and before it."""

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ShardingError(f"strategy {self.strategy!r} is unknown", hint=f"use one of {', '.join(STRATEGIES)}")
        if self.units not in (None, *get_args(Units)):
            raise ShardingError(f"units {self.units!r} are unknown", hint="use block or layer")
        if self.cpu_offload and (not self.how.by_rows or self.how.tensor):
            raise ShardingError(f"{self.strategy} doesn't offload here", hint="use fsdp2 or hsdp, or no cpu_offload")
        if not self.how.tensor and (self.tensor_size is not None or self.tensor_plan is not None):
            raise ShardingError(f"{self.strategy} has no tensor ranks", hint="use tp or fsdp2-tp, or no tensor_size")
        if self.how.tensor and self.how.cuts and (self.tensor_size or 0) < 1:
            raise ShardingError(
                f"{self.strategy} with tensor_size {self.tensor_size}",
                hint="say how many ranks share a layer's features",
            )
        for name in ("param_dtype", "reduce_dtype"):
            dtype = getattr(self, name)
            if dtype is not None and not dtype.is_floating_point:
                raise DtypeError(f"{name} {dtype} is no floating dtype", hint="use torch.bfloat16 or None")

    @property
    def how(self) -> Strategy:
        """How the strategy shards."""
        return STRATEGIES[self.strategy]

    @property
    def unit_rule(self) -> Units:
        """S7: `units`, or what the strategy has where that is left open."""
        return self.units or ("block" if self.how.by_rows else "layer")
