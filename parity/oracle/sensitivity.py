"""How far rounding noise moves a whole network's results: the `sensitivity` tolerance, measured on the oracle itself.

A function is traced to its jaxpr and evaluated again with noise behind each operation that rounds:

    result -> result * (1 + unit * xi),        xi uniform in [-1, 1], independent for every element

that is, every result rounded once to the format whose unit roundoff is `unit`: matrix products and sums (once, at their
end), and elementwise arithmetic and functions. Noise behind matrix products alone misses most of it: on two blocks of
SmolLM2 it moves gradients 4.5 times less in the median and up to 9 times less, since a norm, a softmax or a sum over
tokens rounds as well. The root mean square of the responses over fixed seeds says what an implementation in that format
may differ by, per tensor in the 2-norm. The noise is put into the oracle, so nothing here has seen an implementation.

What `jax.checkpoint` computes again in the backward pass gets fresh noise there, where an implementation repeats the
same bits: the response is that of independent roundings.

docs/tolerances.md, 4: at most `FACTOR` times the response; skipped where that exceeds a `SHARE` of the tensor's norm.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from parity.errors import ParityError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

FACTOR: Final = 32.0
"""How many times the root mean square response a tensor may lie off (docs/tolerances.md, 4)."""
SHARE: Final = 0.1
"""The part of the tensor's 2-norm beyond which that tolerance would say nothing, and the check is skipped."""

ROUNDING: Final = frozenset(
    {"dot_general", "conv_general_dilated", "ragged_dot_general", "reduce_sum", "cumsum"}
    | {"add", "add_any", "sub", "mul", "div", "square", "integer_pow", "pow", "sqrt", "rsqrt"}
    | {"exp", "exp2", "expm1", "log", "log1p", "logistic", "tanh", "erf", "sin", "cos"}
)
"""The primitives whose floating results are rounded; all others only move, choose or compare numbers."""
_COMBINERS: Final = frozenset({"scatter-add", "scatter_add", "reduce", "reduce_window", "select_and_scatter_add"})
"""Primitives that say by an inner jaxpr how they combine two numbers: that addition is not noised."""
_CALLS: Final = ("call_jaxpr", "fun_jaxpr", "jaxpr")
"""Where a primitive that only calls keeps what it calls: jit, checkpoint, custom_jvp_call, custom_vjp_call."""


class SensitivityError(ParityError):
    """A function whose roundings can't all be given noise."""


def noisy(fn: Callable[..., Any], *, unit: float) -> Callable[..., Any]:
    """The function `(key, *args) -> fn(*args)` with noise after each operation that rounds; may be jitted.

    Args:
        fn: any traceable function of arrays, gradients included (`jax.grad(loss)`).
        unit: the unit roundoff of the noise; 0 gives `fn` itself.

    Raises:
        SensitivityError: where a result is too coarse to hold the noise, or arises in a primitive that is unknown here.
    """

    def with_noise(key: Array, *args: Any) -> Any:
        return _evaluated(fn, key, unit, args, resolution=unit)

    return with_noise


def sensitivity(fn: Callable[..., Any], args: Sequence[Any], *, unit: float, seeds: Sequence[int]) -> Any:
    """The root mean square over the seeds of `||noisy - exact||`, the 2-norm of each leaf of `fn(*args)`.

    Returns:
        The pytree of `fn(*args)` with a float for each leaf.

    Raises:
        SensitivityError: as `noisy`, or where there is no seed.
    """
    return responses(fn, args, unit=unit, seeds=seeds)[1]


def responses(fn: Callable[..., Any], args: Sequence[Any], *, unit: float, seeds: Sequence[int]) -> tuple[Any, Any]:
    """`(exact, rms)`: the plain result beside its sensitivity, both from one compilation.

    Raises:
        SensitivityError: as `sensitivity`.
    """
    if not seeds:
        raise SensitivityError("no seed was given", hint="give one or more, fixed, seeds")
    run = _compiled(fn, unit)
    exact = run(jax.random.key(0), 0.0, *args)
    leaves, structure = jax.tree.flatten(exact)
    squares = np.zeros(len(leaves))
    for seed in seeds:
        moved = jax.tree.leaves(run(jax.random.key(seed), unit, *args))
        squares += [float(np.sum(np.square(np.asarray(m - e)))) for m, e in zip(moved, leaves, strict=True)]
    return exact, jax.tree.unflatten(structure, [math.sqrt(s / len(seeds)) for s in squares])


@functools.lru_cache
def _compiled(fn: Callable[..., Any], unit: float) -> Callable[..., Any]:
    """The jitted `(key, level, *args)`, level being the noise's unit: kept, since compiling takes seconds."""
    return jax.jit(lambda key, level, *arguments: _evaluated(fn, key, level, arguments, resolution=unit))


def skip_reason(response: float, norm: float) -> str | None:
    """Why a tensor of this 2-norm can't be judged by this response, or None where it can.

    Args:
        response: what `sensitivity` gave for the tensor.
        norm: the 2-norm of the oracle's tensor.
    """
    if FACTOR * response <= SHARE * norm:
        return None
    return (
        f"rounding noise moves the oracle by {response:.2e} rms: {FACTOR:g} times that is more than "
        f"{SHARE:g} of the tensor's 2-norm {norm:.2e}"
    )


def _evaluated(
    fn: Callable[..., Any], key: Array, unit: float | Array, args: Sequence[Any], *, resolution: float
) -> Any:
    closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
    _require_resolution(closed.jaxpr, resolution)
    outputs = _run(closed, key, unit, jax.tree.leaves(tuple(args)))
    return jax.tree.unflatten(jax.tree.structure(shape), outputs)


def _run(closed: ClosedJaxpr | Jaxpr, key: Array, unit: float | Array, arguments: Sequence[Any]) -> list[Any]:
    """Evaluate a jaxpr with one draw for all its roundings, calls included: a draw apiece takes long to compile."""
    jaxpr = closed.jaxpr if isinstance(closed, ClosedJaxpr) else closed
    rounded = [v.aval for equation in _level(jaxpr) if equation.primitive.name in ROUNDING for v in equation.outvars]
    draw = jax.random.uniform(jax.random.fold_in(key, 0), (sum(a.size for a in rounded),), minval=-1, maxval=1)
    return _evaluate(closed, _Noise(key, unit, draw), arguments)


class _Noise:
    """What one run of a jaxpr draws on, front to back: noise for its roundings, keys for its loops and branches."""

    def __init__(self, key: Array, unit: float | Array, draw: Array) -> None:
        self._key, self.unit, self._draw = key, unit, draw
        self._taken = self._keys = 0

    def perturb_next(self, result: Array) -> Array:
        """`result (1 + unit xi)` with noise that no other result has."""
        xi = self._draw[self._taken : self._taken + result.size].reshape(result.shape)
        self._taken += result.size
        if not jnp.issubdtype(result.dtype, jnp.floating):
            return result  # integers round nothing
        return result * (1 + jnp.asarray(self.unit, result.dtype) * xi.astype(result.dtype))

    def next_key(self) -> Array:
        """A key of its own for a loop or a branch."""
        self._keys += 1
        return jax.random.fold_in(self._key, self._keys)


def _evaluate(closed: ClosedJaxpr | Jaxpr, noise: _Noise, arguments: Sequence[Any]) -> list[Any]:
    """Equation by equation."""
    jaxpr, constants = (closed.jaxpr, closed.consts) if isinstance(closed, ClosedJaxpr) else (closed, ())
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, constants, strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        values.update(zip(equation.outvars, _step(equation, noise, inputs), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _step(equation: Any, noise: _Noise, inputs: list[Any]) -> Sequence[Any]:
    name, params = equation.primitive.name, equation.params
    if name in ROUNDING:
        return [noise.perturb_next(output) for output in _as_it_stands(equation, inputs)]
    if name in _CALLERS:
        return _evaluate(_called(equation), noise, inputs)
    if not _has_rounding(equation):
        return _as_it_stands(equation, inputs)
    if name in _CONTROL:
        return _CONTROL[name](params, noise.next_key(), noise.unit, inputs)
    raise SensitivityError(f"a rounding inside the primitive {name!r}", hint="write the function without it")


_CALLERS: Final = frozenset(
    {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"}
    | {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}
)


def _as_it_stands(equation: Any, inputs: list[Any]) -> Sequence[Any]:
    """The equation itself, without noise."""
    bound = equation.primitive.get_bind_params(equation.params)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)  # later JAX folds the first into the second
    outputs = equation.primitive.bind(*functions, *inputs, **params)
    return outputs if equation.primitive.multiple_results else [outputs]


def _called(equation: Any) -> ClosedJaxpr | Jaxpr:
    return next(equation.params[where] for where in _CALLS if where in equation.params)


def _scan(params: dict[str, Any], key: Array, unit: float | Array, inputs: list[Any]) -> Sequence[Any]:
    """`lax.scan` again, the iteration's number carried along: iteration k draws from the key folded with k."""
    constants, carried = params["num_consts"], params["num_consts"] + params["num_carry"]

    def body(carry: tuple[Array, list[Any]], slices: list[Any]) -> tuple[Any, Any]:
        iteration, state = carry
        arguments = [*inputs[:constants], *state, *slices]
        outputs = _run(params["jaxpr"], jax.random.fold_in(key, iteration), unit, arguments)
        return (iteration + 1, outputs[: params["num_carry"]]), outputs[params["num_carry"] :]

    start = (jnp.zeros((), jnp.uint32), inputs[constants:carried])
    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    (_, state), stacked = lax.scan(body, start, inputs[carried:], **options)
    return [*state, *stacked]


def _while(params: dict[str, Any], key: Array, unit: float | Array, inputs: list[Any]) -> Sequence[Any]:
    """`lax.while_loop` again: its test sees the noisy state, and gets noise of its own."""
    tests, bodies = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]

    def test(carry: tuple[Array, list[Any]]) -> Any:
        folded = jax.random.fold_in(jax.random.fold_in(key, 1), carry[0])
        return _run(params["cond_jaxpr"], folded, unit, [*inputs[:tests], *carry[1]])[0]

    def body(carry: tuple[Array, list[Any]]) -> tuple[Array, list[Any]]:
        folded = jax.random.fold_in(jax.random.fold_in(key, 0), carry[0])
        return carry[0] + 1, _run(params["body_jaxpr"], folded, unit, [*inputs[tests:bodies], *carry[1]])

    return lax.while_loop(test, body, (jnp.zeros((), jnp.uint32), inputs[bodies:]))[1]


def _cond(params: dict[str, Any], key: Array, unit: float | Array, inputs: list[Any]) -> Sequence[Any]:
    """`lax.switch` again: each branch draws from the same key, since one of them runs."""
    branches = [lambda *arguments, _branch=b: _run(_branch, key, unit, arguments) for b in params["branches"]]
    return lax.switch(inputs[0], branches, *inputs[1:])


_CONTROL: Final = {"scan": _scan, "while": _while, "cond": _cond}


def _level(jaxpr: Jaxpr) -> Iterator[Any]:
    """The equations of a jaxpr in the order of their evaluation, those of what it calls in the call's place."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in _CALLERS:
            called = _called(equation)
            yield from _level(called.jaxpr if isinstance(called, ClosedJaxpr) else called)
        else:
            yield equation


def _equations(jaxpr: Jaxpr) -> Iterator[Any]:
    """Every equation of a jaxpr and of all it contains, each once, however often it runs."""
    for equation in jaxpr.eqns:
        yield equation
        yield from _inner_equations(equation)


def _inner_equations(equation: Any) -> Iterator[Any]:
    for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr)):
        if isinstance(inner, ClosedJaxpr | Jaxpr):
            yield from _equations(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner)


def _has_rounding(equation: Any) -> bool:
    if equation.primitive.name in _COMBINERS:
        return False
    return any(e.primitive.name in ROUNDING for e in _inner_equations(equation))


def _require_resolution(jaxpr: Jaxpr, unit: float) -> None:
    """Noise that a result's own format would round away is no noise."""
    for equation in _equations(jaxpr):
        dtype = equation.outvars[0].aval.dtype if equation.primitive.name in ROUNDING else None
        if dtype is not None and jnp.issubdtype(dtype, jnp.floating) and 0 < unit < 8 * float(jnp.finfo(dtype).eps):
            raise SensitivityError(
                f"a result in {dtype} cannot hold noise of unit roundoff {unit:.1e}", hint="trace in float64"
            )
