"""Talk to one exported model, in a process of its own.

    python -P chat.py FOLDER

reads a JSON object a line and answers in the same way::

    {"say": [{"role": "user", "content": "..."}, ...], "max_tokens": 256}   the whole conversation
    {"stop": true}                                                          while it speaks

    {"ready": seconds of loading, "plain": why it writes without a chat template, or ""}
    {"text": "..."}                                                         as it is written
    {"done": {"tokens", "prompt_tokens", "tokens_per_second", "time_to_first_token_seconds", "stopped"}}
    {"error": "..."}

It ends when its input ends. A folder that cannot be used is one error, and exit code 2. How tokens are chosen is what
the export says (``search`` in genai_config.json). Speed is measured as in ``runner.py``: without tokenising and
detokenising, the decoding without the first token, which is a time of its own.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TextIO

from edgeprune.errors import one_line
from edgeprune.profiles import runner

MAX_TOKENS = 256
Message = dict[str, str]


class Speaker(runner.Session):
    """One model, loaded once, that answers conversations."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, prompt=1, generate=2)
        self._tokenizer: Any = None
        self.plain = ""
        """Why conversations are given to it as plain text."""

    def load(self) -> dict[str, Any]:
        """Load model and tokenizer. Refused for damaged files, as ``Session.load``."""
        import onnxruntime_genai as genai

        measured = super().load()
        try:
            self._tokenizer = genai.Tokenizer(self._model)
        except Exception as error:  # as for the model: the runtime raises what it likes
            raise runner.Refused(
                f"{self.folder}: its tokenizer cannot be loaded ({one_line(error)}); export the model again"
            ) from error
        self.plain = self._why_plain()
        return measured

    def _why_plain(self) -> str:
        try:
            self._tokenizer.apply_chat_template(
                json.dumps([{"role": "user", "content": "Hello"}]), add_generation_prompt=True
            )
        except Exception as error:
            if "Empty chat template" in str(error):
                return "the model has no chat template"
            return f"its chat template cannot be used here: {one_line(error)}"
        return ""

    def prompt_of(self, messages: list[Message]) -> str:
        """Return the text that ``messages`` become."""
        if self.plain:
            return "\n".join(message["content"] for message in messages)
        text: str = self._tokenizer.apply_chat_template(
            json.dumps(messages), add_generation_prompt=True
        )
        return text

    def answer(
        self, messages: list[Message], most: int, stop: threading.Event
    ) -> Iterator[dict[str, Any]]:
        """Give the pieces of an answer of at most ``most`` tokens, then its figures.

        Raises:
            RunnerError: the conversation is too long for the model's context.
        """
        tokens = self._tokenizer.encode(self.prompt_of(messages))
        length = self._length(len(tokens), most)
        stream = self._tokenizer.create_stream()
        started = time.perf_counter()
        generator = self._started(tokens, length)
        times: list[float] = []  # that each token took; of the first, from the start
        while not (generator.is_done() or stop.is_set()):
            before = time.perf_counter() if times else started
            generator.generate_next_token()
            times.append(time.perf_counter() - before)
            token = generator.get_next_tokens()[0]
            if token not in self._tokenizer.eos_token_ids:
                text = stream.decode(token)  # nothing until a character is whole
                if text:
                    yield {"text": text}
        stopped = not generator.is_done()
        del generator
        runner.settle()  # its threads would be in the way of the other model
        yield {"done": _figures(times, len(tokens), stopped)}

    def _length(self, prompt: int, most: int) -> int:
        context = int(self.config["context_length"])
        if prompt >= context:
            raise runner.RunnerError(
                f"the conversation has {prompt} tokens, the model's context {context}: begin a new one"
            )
        return min(context, prompt + most)

    def _started(self, tokens: Any, length: int) -> Any:
        import onnxruntime_genai as genai

        params = genai.GeneratorParams(self._model)
        params.set_search_options(batch_size=1, max_length=length)
        generator = genai.Generator(self._model, params)
        generator.append_tokens(tokens)
        return generator


def _figures(times: list[float], prompt: int, stopped: bool) -> dict[str, Any]:
    decoding = sum(times[1:])
    return {
        "tokens": len(times),
        "prompt_tokens": prompt,
        "tokens_per_second": (len(times) - 1) / decoding if decoding else None,
        "time_to_first_token_seconds": times[0] if times else None,
        "stopped": stopped,
    }


# ---- the process


@dataclass(frozen=True)
class Request:
    """A conversation to go on with, and whether to stop in the middle."""

    messages: list[Message]
    max_tokens: int
    stop: threading.Event = field(default_factory=threading.Event)


def listen(requests: queue.Queue[Request | str]) -> NoReturn:
    """Put what is asked on ``requests``, what is wrong with it as text; end the process when nobody can ask."""
    latest: Request | None = None
    for line in sys.stdin:
        try:
            asked = json.loads(line)
            if "stop" in asked:
                if latest is not None:
                    latest.stop.set()
                continue
            latest = _request(asked)
            requests.put(latest)
        except (ValueError, LookupError, TypeError, AttributeError):
            requests.put(f"not understood: {line.strip()[:100]}")
    os._exit(0)  # whoever asked has gone, perhaps in the middle of an answer


def _request(asked: dict[str, Any]) -> Request:
    messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in asked["say"]]
    if not messages:
        raise ValueError
    return Request(messages, max(1, int(asked.get("max_tokens", MAX_TOKENS))))


def converse(speaker: Speaker, answers: TextIO) -> NoReturn:
    """Load the model, then answer for as long as there is somebody to ask."""
    requests: queue.Queue[Request | str] = queue.Queue()
    threading.Thread(target=listen, args=(requests,), daemon=True).start()
    tell(answers, {"ready": speaker.load()["load_seconds"], "plain": speaker.plain})
    while True:
        request = requests.get()
        if isinstance(request, str):
            tell(answers, {"error": request})
            continue
        try:
            for piece in speaker.answer(request.messages, request.max_tokens, request.stop):
                tell(answers, piece)
        except Exception as error:  # the runtime raises what it likes; the next message may do
            tell(answers, {"error": one_line(error)})


def tell(answers: TextIO, message: dict[str, Any]) -> None:
    """Write ``message`` as one line."""
    answers.write(json.dumps(message) + "\n")
    answers.flush()


def main(folder: Path) -> int:
    """Talk until the input ends; return the exit code if the model cannot be loaded."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends us
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    try:
        converse(Speaker(folder), answers)
    except runner.RunnerError as error:
        tell(answers, {"error": str(error)})
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
