"""Transformers lowered for a TPU that is not here, and what follows a run compiled for its mesh."""

import functools
import os
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from lab.data.pipeline import Arrays
from lab.models.bert import BERT
from lab.models.gpt import GPT
from lab.models.vit import ViT
from lab.parallel.sharding import AXES
from lab.planning import topologies
from lab.train.experiment_file import load
from lab.train.program import Program
from tests.conftest import ROOT
from tests.test_topologies import needs_libtpu, same_environment  # noqa: F401 (a fixture)

V5E = AbstractMesh((1,) * 4, AXES, abstract_device=AbstractDevice("TPU v5 lite", None, "tpu"))
KERNEL = "tpu_custom_call"


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("length", [128, 33])
@pytest.mark.parametrize("model", [GPT(vocab=64, context=128), BERT(vocab=64, context=128, dropout=0.0),
                                   ViT(patch=4, classes=10, pool="mean")], ids=lambda model: type(model).__name__)
def test_every_transformer_is_lowered_for_a_tpu(model, length, padded):
    """Forward and backward, in bfloat16: the fused kernel where it can run, and the plain one elsewhere."""
    model = model.clone(depth=1, width=256, heads=2)
    if isinstance(model, ViT):
        if padded:
            pytest.skip("images have no padding")
        inputs, more = jax.ShapeDtypeStruct((4, 4, 4 * length, 3), jnp.bfloat16), {}
    else:
        inputs = jax.ShapeDtypeStruct((4, length), jnp.int32)
        more = {"mask": jax.ShapeDtypeStruct((4, length), jnp.uint8)} if padded else {}
    params = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), inputs)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)

    def loss(params, inputs, more):
        return model.apply(params, inputs, train=True, **more).sum()

    with jax.sharding.use_abstract_mesh(V5E):
        text = jax.jit(jax.grad(loss)).trace(params, inputs, more).lower(lowering_platforms=("tpu",)).as_text()
    assert (KERNEL in text) == (length == 128 and not padded)


class Decoded:
    """Data that can say what its ids are."""

    def decode(self, ids):
        return " ".join(map(str, ids))


@needs_libtpu
def test_what_follows_bert_base_is_compiled_for_eight_chips(tmp_path):
    """The artefacts of `bert_base --full` (at a depth of 2): its own function, which asks for one computation, on the
    mesh that it was trained on. Outside the mesh, the negative control, the attention kernel cannot be divided."""
    topology = topologies.find("v5e-8")
    os.environ.update(topologies.environment(topology))
    experiment = load(ROOT / "experiments/bert_base.py").experiment
    experiment = replace(experiment, model=experiment.model.clone(depth=2))
    program = Program(experiment, devices=topologies.devices(topology))
    compiled = []

    def shapes(tree, sharding):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype, sharding=sharding), tree)

    def compute(f, *arrays, **static):
        given = {"seed": jax.ShapeDtypeStruct((), np.uint32)}
        lowered = program.computing(f, **static).lower(program.abstract, shapes(arrays, program.everywhere), given)
        compiled.append((f, arrays, static, lowered.compile().as_text()))
        return [np.zeros(x.shape, x.dtype) for x in jax.tree.leaves(lowered.out_info)]

    tokens = np.random.default_rng(0).integers(1, 50_000, (20, 513)).astype(np.int32)
    outcome = SimpleNamespace(data=Decoded(), records=Arrays({"tokens": tokens}), model=experiment.model, seed=0,
                              compute=compute, folder=tmp_path)
    assert len(experiment.task.artifacts(outcome)) == 1
    ((f, arrays, static, text),) = compiled
    assert KERNEL in text
    plain = jax.jit(functools.partial(f, experiment.model, **static))
    variables = {"params": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding),
                                        program.abstract.params)}
    with pytest.raises(Exception, match="cannot be automatically partitioned"), \
            jax.sharding.use_abstract_mesh(program.mesh.abstract_mesh):
        plain.lower(variables, *shapes(arrays, program.everywhere)).compile()
