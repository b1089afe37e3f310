"""A judge endpoint for tests: an HTTP server in a thread. Tests choose its replies, also faulty ones."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "fake-judge-2026-01-01"  # the exact id that it returns
_QUOTED = re.compile(r'^(?P<name>[A-Z][^:\n]*): (?P<text>".*")$', re.MULTILINE)


@dataclass
class Answer:
    """A reply. delay: seconds before it. drip: seconds between its bytes."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    content_type: str = "application/json"
    delay: float = 0.0
    drip: float = 0.0


@dataclass
class FakeJudge:
    """The address of the server, and its requests in order. behave: (request, its number) -> Answer."""

    behave: Callable[[dict[str, Any], int], Answer]
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def user_texts(self) -> list[str]:
        """Return the user's message of each request."""
        return [request["messages"][-1]["content"] for request in self.requests]


def says(text: Any, model: str | None = MODEL, **message: Any) -> Answer:
    """Return a chat completion with this text."""
    finish = message.pop("finish_reason", "stop")
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text, **message}}
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": model, "choices": [choice]}
    return Answer(json.dumps(body).encode())


def fails(status: int, message: str = "broken", headers: dict[str, str] | None = None, **error: Any) -> Answer:
    """Return an error in OpenAI's words."""
    return Answer(json.dumps({"error": {"message": message, **error}}).encode(), status, headers or {})


def texts_of(request: dict[str, Any]) -> dict[str, str]:
    """Return the texts of an item in a request with our own instructions, by the words that precede them."""
    user = request["messages"][-1]["content"]
    return {match["name"]: json.loads(match["text"]) for match in _QUOTED.finditer(user)}


def fair(request: dict[str, Any], number: int = 0) -> Answer:
    """An honest judge: 5 for the words of the correct answer, 1 for others, 0 for none. Demands are ignored."""
    texts = texts_of(request)
    predictions = [text for name, text in texts.items() if name.startswith("Predicted")]
    same = all(text == texts["Correct answer"] for text in predictions)
    score = 5 if same else 1 if all(predictions) else 0
    return says(str({"pred": "yes" if same else "no", "score": score}))


THINKING = "<think>\nI need to reply like the example {example}. Now, the predicted answer says"


def judge_by_name(request: dict[str, Any], number: int) -> Answer:
    """A judge with a common habit or fault, chosen by the model's name. The verdict of its replies is `no`, 0."""
    qa = "'pred'" in json.dumps(request["messages"])
    example = "{'pred': 'yes', 'score': 4}" if qa else "{'score': 3}"
    verdict = "{'pred': 'no', 'score': 0}" if qa else "{'score': 0}"
    replies = {
        "good": verdict,
        "half-think": f"Okay. The example was {example}, but here it is wrong.\n</think>\n\n{verdict}",
        "thinking-tag": f"<thinking>maybe {example}</thinking>{verdict}",
        "channels": f"<|channel|>analysis<|message|>maybe {example}<|end|>"
        f"<|start|>assistant<|channel|>final<|message|>{verdict}",
        "mistral": f"[THINK]maybe {example}[/THINK]{verdict}",
        "note": f"{verdict}\nNote: a score of 5 would require the dog.",
    }
    refusals = {
        "new-parameters": {
            "max_tokens": "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.",
            "temperature": "Unsupported value: 'temperature' does not support 0 with this model.",
        },
        "no-system": {"system": "System role not supported"},
        "no-system-500": {"system": "Jinja Exception: Conversation roles must alternate user/assistant/user"},
        "no-system-o1": {"system": "Unsupported value: 'messages[0].role' does not support 'system' with this model."},
        "no-system-422": {"system": "Developer instruction is not enabled for models/gemma"},
    }
    sent = {*request, *(message["role"] for message in request["messages"])}
    match request["model"]:
        case "cut-think":
            return says(THINKING.format(example=example), finish_reason="length")
        case "cut-without-tag":  # the template opened the thought
            return says(f"Okay. The example is {example}. Now", finish_reason="length")
        case "cut-tag-alone":  # the server takes the end for a stop
            return says(THINKING.format(example=example))
        case "empty-reasoning":
            return says("", finish_reason="length", reasoning_content=f"the example is {example}")
        case "null-reasoning":
            return says(None, reasoning=f"the example is {example}")
        case "parts-reasoning":
            return says([{"type": "thinking", "thinking": [{"type": "text", "text": example}]}])
        case "parts":
            thought = {"type": "thinking", "thinking": [{"type": "text", "text": example}]}
            return says([thought, {"type": "text", "text": verdict}])
        case "router":
            return says(verdict, model=f"family/judge-70b:{'ab'[number % 2]}")
        case model if model in refusals:
            status = int(model[-3:]) if model[-3:].isdigit() else 400
            refused = [message for part, message in refusals[model].items() if part in sent]
            return fails(status, refused[0], code="unsupported_value") if refused else says(verdict)
        case model:
            return says(replies[model])


@contextmanager
def judge_server(behave: Callable[[dict[str, Any], int], Answer] = fair) -> Iterator[FakeJudge]:
    """Run the server within the block. `url` is the base URL."""
    judge = FakeJudge(behave)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if not body:  # the client has gone
                return
            request = json.loads(body)
            with judge.lock:
                judge.requests.append(request)
                judge.keys.append(self.headers.get("Authorization"))
                number = len(judge.requests)
            answer = judge.behave(request, number)
            time.sleep(answer.delay)
            with suppress(OSError):  # the client has given up
                self._send(answer)

        def _send(self, answer: Answer) -> None:
            self.send_response(answer.status)
            headers = {"Content-Type": answer.content_type, "Content-Length": str(len(answer.body)), **answer.headers}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if not answer.drip:
                self.wfile.write(answer.body)
                return
            for byte in answer.body:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(answer.drip)

        def log_message(self, format: str, *args: Any) -> None:
            """Log nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    judge.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
