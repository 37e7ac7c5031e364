"""`./launch.sh serve RUN|LOCATION`: a model for others, over HTTP."""

from __future__ import annotations

import ipaddress
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lab.commands.arguments import call
from lab.commands.location import name_of
from lab.errors import UserError

log = logging.getLogger(__name__)
KEY = "LAB_API_KEY"


@dataclass(frozen=True)
class Mesh:
    """The devices of a replica."""

    tensor: int = 1
    """Devices that divide attention heads, the hidden width and the vocabulary."""


def main(args: Sequence[str]) -> int:
    """RUN or LOCATION"""
    return call("serve", serve, args)


def serve(run: Annotated[str, tyro.conf.Positional], port: int = 8000, host: str = "127.0.0.1", slots: int = 4,
          context: int = 2048, queue: int = 64, deadline: float = 300.0, drain: float = 30.0, body: float = 4.0,
          precision: Literal["float32", "bfloat16"] = "float32", name: str | None = None, step: int | None = None,
          best: bool = False, experiment: Path | None = None, replicas: int = 1, mesh: Mesh = Mesh()) -> int:
    """Serves a model over HTTP. A language model by OpenAI's API: /v1/completions and /v1/chat/completions, whole or
    streamed. An encoder: /v1/embeddings. Other runs: /v1/predict, for records of a table, messages or images; a GAN's
    makes images.

    SIGTERM finishes what runs. If LAB_API_KEY is set, requests need it: Authorization: Bearer KEY.

    Args:
      run: the run folder; or weights: hf:ORG/NAME, package:NAME/PATH, a .gguf file, a folder with config.json. Or a
        link to one of these: when `promote` moves it, the new model takes over without losing a request.
      port: the port to listen at; 0: a free one.
      host: the address to listen at; by default only this machine can connect.
      slots: texts that grow at the same time; each has its own part of the key/value cache.
      context: tokens of a prompt and its answer, at most the model's own context.
      queue: requests that may wait; further ones get status 429.
      deadline: seconds for a request, waiting included; later it gets status 504.
      drain: seconds to finish what runs after SIGTERM.
      body: size of a request's body in MiB, at most.
      precision: of a language model's matrices in memory and of the operands of their products; bfloat16 takes half the
        memory, and on CPUs with AMX half the time. All else is float32, as in chat and sample.
      name: what clients call the model; by default the name of the folder or file.
      step: use the checkpoint of this step; by default the latest.
      best: use the checkpoint with the best validation metric.
      experiment: the run's experiment file, needed if it defines classes and was not run on this machine. For the
        weights of a classifier: the experiment file that has the data and the task.
      replicas: of a language model, each with the slots and the queue, on devices of its own.
      mesh: how each replica divides the language model among its devices.
    """
    for flag, value, good in (("port", port, 0 <= port < 65536), ("slots", slots, slots >= 1),
                              ("context", context, context >= 2), ("queue", queue, queue >= 1),
                              ("deadline", deadline, deadline > 0), ("drain", drain, drain >= 0),
                              ("body", body, body > 0), ("replicas", replicas, replicas >= 1),
                              ("mesh.tensor", mesh.tensor, mesh.tensor >= 1)):
        if not good:
            raise UserError(f"--{flag} {value} is out of range.")
    try:
        from lab.commands.serve_models import Options, service_of
        from lab.serve import app, server
        from lab.serve.requests import Limits
        from lab.serve.switch import Switch
    except ImportError as e:
        raise UserError(f"serve needs the package {e.name}: LAB_EXTRAS=serve ./launch.sh serve {run}") from None
    key = os.environ.get(KEY) or None
    sock = server.listen(host, port)
    options = Options(name or name_of(Path(run)), slots, context, queue, deadline, precision, replicas, mesh.tensor)
    limits = Limits(body=int(body * (1 << 20)))
    opened = lambda place: service_of(str(place), options, step, best, experiment)
    built = lambda service: app.build(service, limits=limits, key=key)
    if Path(run).is_symlink():
        service = application = Switch(Path(run), opened, built)
    else:
        application = built(service := opened(run))
    if key is None and not _loopback(sock.getsockname()[0]):
        log.warning("warning: other machines can reach this server, and %s is not set: anybody may use it", KEY)
    return server.serve(application, service, sock, limits=limits, drain=drain)


def _loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
