"""`./launch.sh chat RUN|LOCATION`: talk with a language model in the terminal."""

from __future__ import annotations

import functools
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from lab import signals
from lab.commands.arguments import call
from lab.commands.sample_weights import check_flags, language_model
from lab.errors import UserError
from lab.files import replace_file, user_path
from lab.models.generate import check_numbers
from lab.models.gpt import GPT
from lab.models.session import Session
from lab.weights.location import is_location

Message = dict[str, str]
HELP = "/reset begins anew, /save FILE writes the conversation, /exit ends; Ctrl-C stops an answer."


def main(args: Sequence[str]) -> int:
    """RUN or LOCATION"""
    return call("chat", chat, args)


def chat(run: Annotated[str, tyro.conf.Positional], system: str | None = None, new_tokens: int = 512,
         context: int = 2048, temperature: float = 0.7, top_k: int | None = None, top_p: float = 0.95,
         greedy: bool = False, seed: int = 0, step: int | None = None, best: bool = False,
         experiment: Path | None = None) -> None:
    """Talks with a language model: a line is a message, and the answer comes token by token. Lines may also come from a
    file or pipe. /reset begins anew, /save FILE writes the conversation as JSON, Ctrl-C stops an answer.

    A model without a chat template continues the text of all lines.

    Args:
      run: the run folder; or weights: hf:ORG/NAME, package:NAME/PATH, a .gguf file, a folder with config.json.
      system: how the model should answer.
      new_tokens: maximum number of tokens of an answer.
      context: tokens that the model remembers, at most its own context; the oldest messages are forgotten first.
      temperature: divides the logits. 1 samples from the model's distribution; lower is more deterministic.
      top_k: sample from the k most likely tokens only.
      top_p: sample from the smallest set of tokens with this total probability only.
      greedy: always take the most likely token.
      seed: random seed of the sampling.
      step: use the checkpoint of this step; by default the latest.
      best: use the checkpoint with the best validation metric.
      experiment: the run's experiment file, needed if it defines classes and was not run on this machine.
    """
    check_numbers(new_tokens, temperature, top_k, top_p)
    if context < 2:
        raise UserError(f"--context {context} is out of range.")
    if is_location(run):
        check_flags(run, step, best, experiment)
        (model, variables, text), own = language_model(run), None
    else:
        from lab.train.restore import open_run

        found, _, state = open_run(Path(run), step, best, file=experiment)
        model, variables, text, own = run_language_model(Path(run), found, state)
    template = getattr(text, "config", {}).get("chat_template")
    if system is not None and not (template or own):
        raise UserError(f"--system needs a chat template, and {run} has none.")
    if model.position == "rotary":  # the cache has a row for each position
        model = model.clone(context=min(context, model.context))
    session = Session(model, variables["params"], vocab=text.size, seed=seed,
                      temperature=0.0 if greedy else temperature, top_k=top_k, top_p=top_p)
    opening = [] if system is None else [{"role": "system", "content": system}]
    Talk(session, text, own or prompt_of(text, run), opening, min(new_tokens, model.context // 2)).go()


def run_language_model(run: Path, found: Any, state: Any) -> tuple[Any, Any, Any, Any]:
    """Model, variables, tokenizer; and how dialogues are written, if the run learned from dialogues. `found`, `state`:
    its experiment and checkpoint.

    Raises:
      UserError: a run of no language model.
    """
    import jax

    from lab.train.fitted import data_of
    from lab.train.step import eval_variables

    if not isinstance(found.model, GPT):
        raise UserError(f"{run} is a {type(found.model).__name__}, which continues no text.")
    data = data_of(run, found)
    text = getattr(data, "fitted", None)
    if text is None:
        raise UserError(f"The data of {run} is not text: there is nothing to talk about.")
    return found.model, jax.device_get(eval_variables(found, state)), text, getattr(data, "prompt_ids", None)


def prompt_of(text: Any, title: str) -> Callable[[list[Message]], Sequence[int]]:
    """Messages -> ids, by the tokenizer's chat template; without one, the text of all of them. `title`: names the model
    in errors."""
    if getattr(text, "config", {}).get("chat_template"):
        return functools.partial(text.encode_messages, answers=True, title=title)
    start = [] if text.eot is None else [text.eot]
    return lambda messages: start + text.encode("".join(m["content"] for m in messages)).tolist()


class Talk:
    """A conversation on standard input and output."""

    def __init__(self, session: Session, text: Any, encode: Callable[[list[Message]], Sequence[int]],
                 opening: list[Message], new_tokens: int):
        self.session, self.text, self.encode, self.new_tokens = session, text, encode, new_tokens
        self.opening, self.messages = opening, list(opening)
        self.stop = () if text.eot is None else (text.eot,)

    def go(self) -> None:
        """Reads lines until they end."""
        terminal = sys.stdin.isatty()
        if terminal:
            print(HELP)
        while True:
            if terminal:
                print("> ", end="", flush=True)
            line = sys.stdin.readline()
            if not line or line.strip() == "/exit":
                return
            if line.startswith("/"):
                self._command(*line.strip().partition(" ")[::2])
            elif line.strip():
                try:
                    self.answer(line.rstrip("\n"))
                except UserError as e:
                    if not terminal:
                        raise
                    print(e)
                    del self.messages[-1]  # the question; those forgotten for it stay so

    def _command(self, name: str, argument: str) -> None:
        if name == "/reset":
            self.messages = list(self.opening)
        elif name == "/save" and argument:
            try:
                replace_file(user_path(argument), json.dumps({"messages": self.messages}, indent=2,
                                                             ensure_ascii=False) + "\n")
                print(f"{len(self.messages)} messages are in {argument}")
            except OSError as e:
                print(f"{argument} cannot be written: {e.strerror}.")
        else:
            print(HELP)

    def answer(self, line: str) -> None:
        """Prints the answer to a line as it comes, and remembers both."""
        self.messages.append({"role": "user", "content": line})
        ids = self._fitting()
        stopped, begun, new, shown = threading.Event(), time.perf_counter(), [], ""
        with signals.interrupted(stopped.set):
            for token in self.session.tokens(ids, self.stop):
                new.append(token)
                whole = self.text.continuation(ids, new)
                if not whole.endswith("\ufffd"):  # else in the middle of a character
                    print(whole[len(shown):], end="", flush=True)
                    shown = whole
                if stopped.is_set() or len(new) == self.new_tokens:
                    break
        answer = self.text.continuation(ids, new)
        print(answer[len(shown):], end="")  # it may end in the middle of a character
        seconds = time.perf_counter() - begun
        print(f"\n[{len(new)} tokens, {len(new) / seconds:.1f} per second]" if sys.stdout.isatty() else "")
        self.messages.append({"role": "assistant", "content": answer})

    def _fitting(self) -> Sequence[int]:
        """The ids of the conversation; forgets the oldest messages until an answer has room.

        Raises:
          UserError: the last message alone is too long.
        """
        room, begin = self.session.context - self.new_tokens, len(self.opening)
        while len(ids := self.encode(self.messages)) > room and len(self.messages) > begin + 1:
            del self.messages[begin:begin + 2]
        if len(ids) > room:
            raise UserError(f"The message has {len(ids)} tokens, and the model has room for {room} beside an answer of "
                            f"{self.new_tokens}: give a shorter one, or more --context.")
        return ids
