"""The same application under Ray Serve, which starts, spreads and scales replicas.

    pip install "ray[serve]"          # in the environment with the extras serve and chat
    LAB_RUN=runs/gpt_small-... serve run lab.serve.examples.ray_serve:application
"""

from __future__ import annotations

import os
from typing import Any

from ray import serve

from lab.commands.serve_models import Options, service_of
from lab.serve import app
from lab.serve.requests import Limits

SLOTS, QUEUE = 16, 64


def build() -> Any:
    """The web application of one replica; compiles in a thread of its own."""
    options = Options("model", slots=SLOTS, context=2048, queue=QUEUE, deadline=300.0)
    service = service_of(os.environ["LAB_RUN"], options, None, False, None)
    service.start()
    return app.build(service, limits=Limits(), key=os.environ.get("LAB_API_KEY"))


@serve.deployment(ray_actor_options={"num_cpus": 2, "runtime_env": {"env_vars": {"JAX_PLATFORMS": "cpu"}}},
                  max_ongoing_requests=SLOTS + QUEUE,
                  autoscaling_config={"min_replicas": 1, "max_replicas": 8, "target_ongoing_requests": SLOTS})
@serve.ingress(build)
class Model:
    """A replica."""


application = Model.bind()
