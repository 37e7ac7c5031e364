"""The cost of a run (parameters, FLOPs, bytes), from shapes only: computes nothing and reads no data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters.partial_eval import dce_jaxpr

from lab.adapt.lora import every
from lab.experiment import Experiment
from lab.parallel.sharding import path_of
from lab.train.shapes import abstract_state, batch_spec, taught_of
from lab.train.step import State, make_loss, make_optimizer, make_train_step, prepare


def count_flops(jaxpr: Jaxpr | ClosedJaxpr) -> int:
    """FLOPs of the matmuls and convolutions in a jaxpr, 2 per multiply-add.

    Scan bodies and Pallas kernels are multiplied by their trip count (XLA's own cost analysis counts them once). Masked
    elements count in full, a `cond` as its largest branch, the body of a `while` once (unknown trip count).
    """
    total = 0
    for eqn in (jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr).eqns:
        name, out = eqn.primitive.name, eqn.outvars[0].aval if eqn.outvars else None
        if name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            total += 2 * math.prod(out.shape) * math.prod(eqn.invars[0].aval.shape[i] for i in contract)
        elif name == "conv_general_dilated":
            kernel, numbers = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"]
            total += 2 * math.prod(out.shape) * math.prod(kernel) // kernel[numbers.rhs_spec[0]]
        elif name.startswith("dot_product_attention"):  # cuDNN: two matmuls of (B, L, N, K) with (B, S, G, K)
            total += 4 * math.prod(eqn.invars[0].aval.shape) * eqn.invars[1].aval.shape[1]
        elif name == "cond":
            total += max(count_flops(branch) for branch in eqn.params["branches"])
        else:
            inner = sum(count_flops(p) for p in eqn.params.values() if isinstance(p, Jaxpr | ClosedJaxpr))
            total += inner * _runs(name, eqn.params)
    return total


def _runs(name: str, params: dict[str, Any]) -> int:
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    return params["length"] if name == "scan" else 1


@dataclass(frozen=True)
class Cost:
    """The cost of one experiment. Bytes are for the whole program, not for one device."""

    state: State
    flops: int
    """Per step: 3 x the forward FLOPs (the backward pass takes twice the forward FLOPs). Excludes recomputation. With
    adapters or a teacher: the FLOPs of the gradient as traced, which has none of the frozen parameters."""
    activations: int
    """Bytes of residuals for the backward pass of one microbatch, before compiler fusion."""

    @property
    def parameters(self) -> int:
        """Number of parameters, the frozen ones of adapters' base included."""
        return sum(x.size for x in jax.tree.leaves(every(self.state)))

    def modules(self, depth: int = 1) -> list[tuple[str, int, int]]:
        """(module, parameters, arrays) per module path of `depth` names; stacked or numbered blocks share a row."""
        rows: dict[str, list[int]] = {}
        for path, leaf in jax.tree.leaves_with_path(every(self.state)):
            names = path_of(path).split("/")[:depth]
            row = rows.setdefault("/".join(_without_number(n) for n in names), [0, 0])
            row[0], row[1] = row[0] + leaf.size, row[1] + 1
        return [(name, size, arrays) for name, (size, arrays) in rows.items()]


def _without_number(name: str) -> str:
    stem, _, number = name.rpartition("_")
    return f"{stem}_*" if stem and number.isdigit() else name


def size_of(tree: Any) -> int:
    """Bytes of all arrays in a tree of (abstract) arrays."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def cost_of(experiment: Experiment) -> Cost:
    """Computes the cost by tracing the loss of one microbatch."""
    state = abstract_state(experiment)
    base = getattr(state, "base", None)
    rows = experiment.batch // experiment.grad_accum_steps
    batch = {name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for name, x in batch_spec(experiment).items()}

    def loss(params: Any, model_state: Any, batch: Any, base: Any) -> tuple[Any, Any]:
        return make_loss(experiment, base)(params, model_state, prepare(experiment, batch, True, 0), 0, 0)

    def residuals(params: Any, *others: Any) -> Any:
        return jax.vjp(lambda p: loss(p, *others), params, has_aux=True)[1]

    # Two traces: the forward pass under vjp may contain gradient matmuls (chunked losses), which must not be counted.
    forward = jax.make_jaxpr(loss)(state.params, state.model_state, batch, base)
    kept = jax.eval_shape(residuals, state.params, state.model_state, batch, base)
    flops = 3 * count_flops(forward)
    if base is not None or taught_of(experiment) is not None:
        gradient = jax.make_jaxpr(jax.grad(loss, has_aux=True))(state.params, state.model_state, batch, base).jaxpr
        flops = count_flops(dce_jaxpr(gradient, [True] * len(gradient.outvars))[0])  # custom derivatives have all
    return Cost(state, flops * experiment.grad_accum_steps, size_of(kept))


def optimizer_flops(experiment: Experiment, state: State) -> int:
    """FLOPs of the optimizer's matmuls per step (Muon's iterations); 0 for element-wise optimizers."""
    update = make_optimizer(experiment, batch_spec(experiment)).update

    def updated(params: Any, opt_state: Any, model_state: Any) -> Any:
        return update(params, opt_state, params, model_state=model_state)

    return count_flops(jax.make_jaxpr(updated)(state.params, state.opt_state, state.model_state))


def step_flops(experiment: Experiment) -> int:
    """FLOPs of the whole traced step, including the optimizer and recomputation."""
    return count_flops(jax.make_jaxpr(make_train_step(experiment))(abstract_state(experiment), batch_spec(experiment)))
