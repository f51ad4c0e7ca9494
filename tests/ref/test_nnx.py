"""The flax modules are the pure functions, to the bit, and behave as flax's own: paths, filters, rngs, shardings."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec

from ref import dora, layers, mesh, quant
from ref import nnx as adapted
from ref.nnx import TRAINABLE, DoRAConfig, DoRAConv, DoRAEmbed, DoRALinear, DoRALinearGeneral, QDoRALinear
from ref.quant import QuantizationError
from ref.types import Adapter, InputError

CONFIG = DoRAConfig(rank=2, alpha=4.0)
WIDE = DoRAConfig(rank=2, alpha=4.0, param_dtype="float64")
ANOTHER_ROUTE = 2.0**-24
"""Of float64 results by two routes, relative to the largest: half a billion roundings, and less than any mistake."""
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 6)), jnp.float32)
IMAGE = jnp.asarray(np.random.default_rng(1).normal(size=(2, 6, 5, 4)), jnp.float32)
IDS = jnp.asarray([[0, 3], [3, 7]])


def rngs() -> nnx.Rngs:
    """The same numbers each time."""
    return nnx.Rngs(params=0, dropout=1)


def trained(layer: nnx.Module) -> nnx.Module:
    """The layer with B != 0 and a magnitude off the norm."""
    random = np.random.default_rng(3)
    layer.lora_a[...] = jnp.asarray(random.normal(size=layer.lora_a.shape), layer.lora_a.dtype)
    layer.lora_b[...] = jnp.asarray(random.normal(size=layer.lora_b.shape), layer.lora_b.dtype)
    layer.magnitude[...] = layer.magnitude[...] * 1.25
    return layer


BIASED = {"bias_init": nnx.initializers.normal(1.0)}
CONV = {"strides": 2, "kernel_dilation": (1, 2), "feature_group_count": 2}
BASES = {
    "linear": lambda **dtypes: nnx.Linear(6, 3, **BIASED, **dtypes, rngs=rngs()),
    "no bias": lambda **dtypes: nnx.Linear(6, 3, use_bias=False, **dtypes, rngs=rngs()),
    "general": lambda **dtypes: nnx.LinearGeneral((5, 6), (2, 3), axis=(-2, -1), **BIASED, **dtypes, rngs=rngs()),
    "embed": lambda **dtypes: nnx.Embed(8, 3, **dtypes, rngs=rngs()),
    "conv": lambda **dtypes: nnx.Conv(4, 6, (3, 2), **CONV, **BIASED, **dtypes, rngs=rngs()),
}
INPUTS = {"linear": X, "no bias": X, "general": X, "embed": IDS, "conv": IMAGE}
KINDS = pytest.mark.parametrize("kind", BASES)


def adapt(base: nnx.Module, config: DoRAConfig = CONFIG, **options) -> nnx.Module:
    """One layer with an adapter."""
    return adapted.apply_dora(base, config, rngs=rngs(), targets=lambda *_: True, **options)


def wide(kind: str) -> tuple[nnx.Module, Array]:
    """A base in float64, and its input."""
    x = INPUTS[kind]
    return BASES[kind](param_dtype=jnp.float64), x if kind == "embed" else x.astype(jnp.float64)


def assert_same_function(got: Array, want: Array) -> None:
    """Two routes to the same numbers, in float64."""
    assert got.shape == want.shape
    assert {got.dtype, want.dtype} == {jnp.dtype("float64")}
    assert float(jnp.max(jnp.abs(got - want))) <= ANOTHER_ROUTE * float(jnp.max(jnp.abs(want)))


@KINDS
def test_d12_an_adapted_layer_starts_as_its_base(kind: str) -> None:
    """Before training the output is the base's."""
    base, x = wide(kind)

    assert_same_function(adapt(base, WIDE)(x), base(x))


@KINDS
def test_d10_merged_is_a_plain_layer_that_does_the_same(kind: str) -> None:
    """Merging gives flax's own layer, whose output is the adapted one's."""
    base, x = wide(kind)
    layer = trained(adapt(base, WIDE))

    plain = adapted.merge(layer)

    assert type(plain) is type(base)
    assert_same_function(plain(x), layer(x))


@KINDS
def test_what_is_trained_is_an_adapter(kind: str) -> None:
    """The filter picks A, B and the magnitude, all float32, and leaves the base's variables."""
    state = nnx.state(adapt(BASES[kind]()), TRAINABLE)

    assert sorted(state) == ["lora_a", "lora_b", "magnitude"]
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float32")}


@KINDS
def test_the_base_keeps_its_own_variables(kind: str) -> None:
    """An adapted layer holds the very variables of its base, under their names."""
    base = BASES[kind]()

    layer = adapt(base)

    name = "embedding" if kind == "embed" else "kernel"
    assert getattr(layer, name)[...] is getattr(base, name)[...]


def test_d8_linear_is_the_pure_function() -> None:
    """DoRALinear is `dora.forward` on the transposed variables, to the bit."""
    layer = trained(adapt(BASES["linear"]()))
    adapter = Adapter(layer.lora_a[...].T, layer.lora_b[...].T, layer.magnitude[...])

    y_TO = dora.forward(X.reshape(-1, 6), layer.kernel[...].T, adapter, scaling=2.0, bias_O=layer.bias[...])

    assert layer(X).reshape(-1, 3).tolist() == y_TO.tolist()


def test_d3_general_is_the_pure_function_of_flattened_features() -> None:
    """DoRALinearGeneral is `dora.forward` on features laid side by side, to the bit."""
    layer = trained(adapt(BASES["general"]()))

    y_TO = dora.forward(X.reshape(2, 30), layer.kernel[...].reshape(30, 6).T, layer.adapter, scaling=2.0)

    assert layer(X).reshape(2, 6).tolist() == (y_TO + layer.bias[...].reshape(1, 6)).tolist()


def test_d3_embed_is_the_pure_function() -> None:
    """DoRAEmbed is `layers.embedding`, to the bit, as a head, too."""
    layer = trained(adapt(BASES["embed"]()))

    y_TD = layers.embedding(IDS.reshape(-1), layer.embedding[...], layer.adapter, scaling=2.0)

    assert layer(IDS).reshape(-1, 3).tolist() == y_TD.tolist()
    assert layer.attend(layer(IDS)).tolist() == (layer(IDS) @ layer(jnp.arange(8)).T).tolist()


PADDINGS = ["SAME", "VALID", "CIRCULAR", "REFLECT", 2, ((0, 1), (2, 0))]


@pytest.mark.parametrize("padding", PADDINGS, ids=str)
def test_d3_conv_pads_as_flax_does(padding) -> None:
    """Every padding of flax's convolution gives the merged plain layer's output."""
    options = {"strides": (2, 1), "kernel_dilation": 2, "feature_group_count": 2, "param_dtype": jnp.float64}
    layer = trained(adapt(nnx.Conv(4, 6, (3, 2), padding=padding, **options, rngs=rngs()), WIDE))
    x = IMAGE.astype(jnp.float64)

    assert_same_function(layer(x), adapted.merge(layer)(x))


def test_d3_causal_conv() -> None:
    """A causal convolution in one dimension, unbatched, sees no later input."""
    layer = trained(adapt(nnx.Conv(4, 6, 3, padding="CAUSAL", rngs=rngs())))

    got = layer(IMAGE[0, 0])

    assert got.shape == (5, 6)
    assert layer(IMAGE[0, 0].at[3:].set(0))[:3].tolist() == got[:3].tolist()


def test_d3_conv_is_the_pure_function() -> None:
    """DoRAConv is `layers.convolution` with channels moved first, to the bit."""
    layer = trained(adapt(nnx.Conv(4, 6, (3, 2), padding=1, feature_group_count=2, **BIASED, rngs=rngs())))
    window = layers.Window((1, 1), (1, 1), (1, 1), groups=2)

    y_NO = layers.convolution(
        jnp.moveaxis(IMAGE, -1, 1),
        jnp.moveaxis(layer.kernel[...], (-1, -2), (0, 1)),
        layer.adapter,
        window=window,
        scaling=2.0,
        bias_O=layer.bias[...],
    )

    assert jnp.moveaxis(layer(IMAGE), -1, 1).tolist() == y_NO.tolist()


@pytest.mark.parametrize("norm_gradient", ["constant", "full"])
def test_d5_gradients_are_those_of_the_pure_function(norm_gradient) -> None:
    """Through nnx.grad, A, B and m get the pure function's gradients, to the bit."""
    layer = trained(adapt(BASES["linear"](), replace(CONFIG, norm_gradient=norm_gradient)))
    x_TI = X.reshape(-1, 6)

    got = nnx.grad(lambda layer: jnp.sum(layer(x_TI) ** 2), argnums=nnx.DiffState(0, TRAINABLE))(layer)

    def pure(adapter: Adapter) -> Array:
        kernel, bias = layer.kernel[...].T, layer.bias[...]
        y_TO = dora.forward(x_TI, kernel, adapter, scaling=2.0, bias_O=bias, norm_gradient=norm_gradient)
        return jnp.sum(y_TO**2)

    want = jax.grad(pure)(layer.adapter)
    assert got["lora_a"][...].T.tolist() == want.lora_A.tolist()
    assert got["lora_b"][...].T.tolist() == want.lora_B.tolist()
    assert got["magnitude"][...].tolist() == want.magnitude.tolist()


def test_d9_dropout_follows_train_and_eval() -> None:
    """In eval nothing is dropped; in train the mask is what the dropout stream makes of ones."""
    layer = trained(adapt(BASES["linear"](), replace(CONFIG, dropout_rate=0.5)))
    whole = trained(adapt(BASES["linear"]()))
    x_TI = X.reshape(-1, 6)
    mask_TI = nnx.clone(layer).dropout(jnp.ones_like(x_TI))

    layer.train()
    dropped = layer(x_TI)
    layer.eval()

    want = dora.forward(x_TI, layer.kernel[...].T, layer.adapter, scaling=2.0, bias_O=layer.bias[...], mask_TI=mask_TI)
    assert dropped.tolist() == want.tolist()
    assert layer(x_TI).tolist() == whole(x_TI).tolist()


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_q4_quantised_is_the_pure_functions(nested) -> None:
    """QDoRALinear is decode and `dora.forward` of bitsandbytes' bytes of the weight (out, in), to the bit."""
    base = nnx.Linear(6, 40, **BIASED, rngs=rngs())
    layer = trained(adapt(base, replace(CONFIG, quant_type="nf4", nested=nested)))
    packed, state = quant.encode(np.asarray(base.kernel[...]).T, profile="bnb-cpu", nested=nested)

    W_OI = quant.decode(packed, state)
    y_TO = dora.forward(X.reshape(-1, 6), W_OI, layer.adapter, scaling=2.0, bias_O=layer.bias[...])

    assert layer.packed[...].tolist() == packed.tolist()
    assert layer(X).reshape(-1, 40).tolist() == y_TO.tolist()


@pytest.mark.parametrize("quant_type", [None, "nf4"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_d6_magnitude_is_of_the_weight_that_is_used(dtype, quant_type) -> None:
    """The magnitude at start is the norm of the decoded and cast weight, so that every ratio is 1 at start."""
    base = nnx.Linear(6, 40, dtype=dtype, rngs=rngs())

    layer = adapt(base, replace(CONFIG, quant_type=quant_type))

    assert layer.weight().dtype == dtype
    assert dora.ratio(layer.magnitude[...], dora.weight_norm(layer.weight())).tolist() == [1.0] * 40
    assert layer(X).dtype == dtype


def test_q4_merging_a_quantised_layer_gives_a_plain_one() -> None:
    """The merged layer is flax's Linear with the merged dequantised weight."""
    layer = trained(adapt(nnx.Linear(6, 40, rngs=rngs()), replace(CONFIG, quant_type="nf4")))

    plain = adapted.merge(layer)

    want = dora.merge(layer.weight(), layer.adapter, scaling=2.0)
    assert type(plain) is nnx.Linear
    assert plain.kernel[...].T.tolist() == want.tolist()


class Network(nnx.Module):
    """Layers of several kinds, nested, with a head of its own."""

    def __init__(self, rngs: nnx.Rngs, param_dtype: type = jnp.float32) -> None:
        options = {"param_dtype": param_dtype, "rngs": rngs}
        self.table = nnx.Embed(8, 6, **options)
        self.blocks = nnx.List([nnx.MultiHeadAttention(2, 6, decode=False, **options) for _ in range(2)])
        self.body = nnx.Sequential(nnx.Linear(6, 6, **options), nnx.relu, nnx.BatchNorm(6, **options))
        self.head = nnx.Linear(6, 3, **BIASED, **options)

    def __call__(self, ids: Array) -> Array:
        """Identifiers to scores."""
        x = self.table(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.body(x))


def paths(model: nnx.Module) -> set[str]:
    """Where adapters are."""
    return {".".join(map(str, path[:-1])) for path, _ in nnx.to_flat_state(nnx.state(model, TRAINABLE))}


ATTENTION = {f"blocks.{block}.{name}" for block in (0, 1) for name in ("query", "key", "value", "out")}


def test_apply_dora_finds_every_linear_layer() -> None:
    """In any model, lists and attention among it, linear layers get adapters and nothing else does."""
    model = adapted.apply_dora(Network(rngs()), CONFIG, rngs=rngs())

    assert paths(model) == ATTENTION | {"body.layers.0", "head"}


def test_apply_dora_takes_targets() -> None:
    """`targets` chooses by path and module."""
    model = adapted.apply_dora(
        Network(rngs()), CONFIG, rngs=rngs(), targets=lambda path, _: path and path[-1] in ("head", "table")
    )

    assert paths(model) == {"head", "table"}


def test_apply_dora_keeps_the_output_and_the_model() -> None:
    """The model computes what it did, and the one that was given still has no adapter."""
    base = Network(rngs(), param_dtype=jnp.float64)
    base.eval()

    model = adapted.apply_dora(base, WIDE, rngs=rngs())

    model.eval()
    with jax.numpy_dtype_promotion("standard"):  # flax's own attention and normalisation mix float32 in
        assert_same_function(model(IDS), base(IDS))
    assert not jax.tree.leaves(nnx.state(base, TRAINABLE))


def test_merge_undoes_every_adapter() -> None:
    """A merged model has none left and the paths that it had."""
    base = Network(rngs())

    model = adapted.merge(adapted.apply_dora(base, CONFIG, rngs=rngs()))

    assert not jax.tree.leaves(nnx.state(model, TRAINABLE))
    assert set(dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))) == set(
        dict(nnx.to_flat_state(nnx.state(base, nnx.Param)))
    )


@pytest.mark.parametrize("quant_type", [None, "nf4"])
def test_training_moves_adapters_alone(quant_type) -> None:
    """A few jitted steps of flax's optimizer lower the loss and leave the base's bits."""
    net = nnx.Sequential(nnx.Linear(6, 16, rngs=rngs()), nnx.relu, nnx.Linear(16, 3, rngs=rngs()))
    model = adapted.apply_dora(net, replace(CONFIG, quant_type=quant_type), rngs=rngs())
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=TRAINABLE)
    frozen = jax.tree.map(np.asarray, nnx.state(model, adapted.FROZEN))

    @nnx.jit
    def step(model: nnx.Module, optimizer: nnx.Optimizer) -> Array:
        def loss(model: nnx.Module) -> Array:
            return jnp.mean((model(X) - 1) ** 2)

        value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, TRAINABLE))(model)
        optimizer.update(model, gradients)
        return value

    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
        losses = [float(step(model, optimizer)) for _ in range(5)]

    assert losses == sorted(losses, reverse=True)
    after = jax.tree.map(np.asarray, nnx.state(model, adapted.FROZEN))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), frozen, after)))


@pytest.mark.parametrize("quant_type", [None, "nf4"])
def test_s10_metadata_follows_the_kernel(quant_type) -> None:
    """Adapters are laid out on a mesh as the kernel's own axes are."""
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("shard", "tensor"))
    with jax.set_mesh(mesh.make_mesh(shard=2, tensor=2)):
        base = nnx.Linear(6, 4, kernel_init=init, rngs=rngs())
        layer = adapt(base, replace(CONFIG, quant_type=quant_type))

    specs = nnx.get_partition_spec(nnx.state(layer, TRAINABLE))
    assert specs["lora_a"].get_value() == PartitionSpec("shard", None)
    assert specs["lora_b"].get_value() == PartitionSpec(None, "tensor")
    assert specs["magnitude"].get_value() == PartitionSpec("tensor")


def not_finite() -> nnx.Sequential:
    """A model whose second layer has a NaN."""
    net = nnx.Sequential(nnx.Linear(6, 4, rngs=rngs()), nnx.Linear(4, 2, rngs=rngs()))
    net.layers[1].kernel[...] = net.layers[1].kernel[...].at[3, 1].set(jnp.nan)
    return net


def test_q7_a_weight_that_is_not_finite_is_named() -> None:
    """The layer's path and the index stand in the error."""
    with pytest.raises(QuantizationError, match=r"layers\.1: .*index \(1, 3\)"):
        adapted.apply_dora(not_finite(), replace(CONFIG, quant_type="nf4"), rngs=rngs())


@pytest.mark.parametrize(
    ("base", "config", "said"),
    [
        (lambda: nnx.BatchNorm(3, rngs=rngs()), CONFIG, "BatchNorm has no adapted form"),
        (BASES["conv"], replace(CONFIG, quant_type="nf4"), "Conv has no quantised"),
        (BASES["embed"], replace(CONFIG, dropout_rate=0.5), "reads identifiers"),
        (lambda: nnx.Conv(4, 6, 3, input_dilation=2, rngs=rngs()), CONFIG, "input dilation"),
        (lambda: nnx.Linear(6, 3, precision="highest", rngs=rngs()), CONFIG, "its own precision"),
        (lambda: nnx.LinearGeneral(6, 3, batch_axis={0: 2}, rngs=rngs()), CONFIG, "batch_axis"),
    ],
    ids=["kind", "quantised", "dropout", "input dilation", "precision", "batch axis"],
)
def test_what_cannot_be_adapted_is_refused(base, config, said) -> None:
    """A layer without an adapted form is named, with the reason."""
    with pytest.raises(InputError, match=said):
        adapt(base(), config)


def test_no_target_is_refused() -> None:
    """A model in which nothing is targeted is refused, not returned as it was."""
    with pytest.raises(InputError, match="no layer is targeted"):
        adapted.apply_dora(nnx.BatchNorm(3, rngs=rngs()), CONFIG, rngs=rngs())


@pytest.mark.parametrize(
    "wrong",
    [{"rank": 0}, {"alpha": -1.0}, {"dropout_rate": 1.0}, {"param_dtype": "bfloat16"}],
    ids=str,
)
def test_a_config_refuses(wrong) -> None:
    """A configuration that no layer could have is refused when it is made."""
    with pytest.raises(InputError):
        DoRAConfig(**({"rank": 2, "alpha": 4.0} | wrong))


@pytest.mark.parametrize(
    ("kind", "made"),
    [
        ("linear", lambda: DoRALinear(6, 3, config=CONFIG, rngs=rngs())),
        ("general", lambda: DoRALinearGeneral((5, 6), (2, 3), axis=(-2, -1), config=CONFIG, rngs=rngs())),
        ("embed", lambda: DoRAEmbed(8, 3, config=CONFIG, rngs=rngs())),
        ("conv", lambda: DoRAConv(4, 6, (3, 2), config=CONFIG, rngs=rngs())),
    ],
    ids=["linear", "general", "embed", "conv"],
)
def test_modules_are_made_like_flax_own(kind: str, made) -> None:
    """Each is made with its base's arguments and a configuration."""
    assert made()(INPUTS[kind]).shape[-1] in (3, 6)


def test_q4_a_packed_weight_makes_a_layer() -> None:
    """Bytes and state, as a checkpoint has them, make a layer without the weight ever being given."""
    packed, state = quant.encode(np.ones((40, 6), np.float32))

    layer = QDoRALinear(packed, state, config=CONFIG, rngs=rngs())

    assert layer(X).shape == (2, 5, 40)
