"""Serve: answers a second of `stllm serve`, which answers waiting questions in a batch, against one at a time.

The tiny model that ships with the package answers questions about its example clips, whose encodings are cached. Its
answers are one word, so reading the prompts takes most of the time. For long answers its output head is replaced by one
that never ends an answer. Each server is a separate process. A client sends its next question when it has received an
answer. With --engine another server decodes the short answers (`stllm convert stllm/assets/stllm-tiny --to DIR --format
language-model`, `vllm serve DIR --enable-prompt-embeds --dtype float32`). That server uses processor time even while it
waits, so the other rows of such a run are slower.

    python -m benchmarks.serve [--quick] [--engine URL]
"""

import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import httpx
from safetensors.torch import load_file, save_file

from benchmarks.common import arguments, report, resident_bytes
from stllm.conversation.chat import EXAMPLES, FOLDER, find_examples, load_chat

ONE, TOGETHER, ENGINE = "one at a time", "together", "another server decodes"
CLIENTS = (1, 8, 32)
PLACES = 64
SHORT, LONG = "a word", "64 tokens"
MAX_TOKENS = 64
HEAD = "language_model.lm_head.weight"
SERVER = "import sys; from stllm.conversation import streaming; {limit}; from stllm.cli import main; main(sys.argv[1:])"


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds that a process has used so far, or 0 without /proc."""
    stat = Path(f"/proc/{pid}/stat")
    fields = stat.read_text().rpartition(")")[2].split() if stat.exists() else ["0"] * 13
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def write_endless(folder: Path) -> None:
    """Write the tiny model with an output head that always gives one token, so that an answer never ends."""
    shutil.copytree(FOLDER, folder)
    weights = load_file(folder / "model.safetensors")
    weights[HEAD].zero_()[MAX_TOKENS] = 1e-9  # any token that does not end the answer
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@dataclass(frozen=True)
class Running:
    """A running server. model: the name of the served model. url: its address. pid: its process id."""

    model: str
    url: str
    pid: int

    def ask(self, client: httpx.Client, question: tuple[str, str]) -> str:
        """Send a question, (file, text), and return the answer."""
        file, text = question
        content = [{"type": "video_url", "video_url": {"url": file}}, {"type": "text", "text": text}]
        body = {"model": self.model, "messages": [{"role": "user", "content": content}], "max_tokens": MAX_TOKENS}
        reply = client.post(f"{self.url}/chat/completions", json=body).raise_for_status()
        return str(reply.json()["choices"][0]["message"]["content"])

    def answer(self, questions: Sequence[tuple[str, str]], num_clients: int) -> tuple[float, float, list[str]]:
        """Send questions from several clients. Returns the seconds, the CPU seconds of the server, and the answers."""
        limits = httpx.Limits(max_connections=num_clients, max_keepalive_connections=num_clients)
        with httpx.Client(timeout=600, limits=limits) as client, ThreadPoolExecutor(num_clients) as threads:
            start, cpu = time.perf_counter(), cpu_seconds(self.pid)
            answers = list(threads.map(partial(self.ask, client), questions))
            return time.perf_counter() - start, cpu_seconds(self.pid) - cpu, answers


@contextmanager
def server(folder: Path, *options: str, device: str, max_rows: int | None = None) -> Iterator[Running]:
    """Run `stllm serve` with a checkpoint. max_rows: the most questions in one batch (None: the default)."""
    code = SERVER.format(limit="pass" if max_rows is None else f"streaming.MAX_ROWS = {max_rows}")
    command = [sys.executable, "-c", code, "serve", "--ckpt-path", str(folder), "--media-root", str(EXAMPLES)]
    command += ["--port", "0", "--queue-size", str(PLACES), "--device", device, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            words = process.stdout.readline().split()  # NAME answers at URL (...)
            if not words:
                raise SystemExit("error: the server did not start; see above")
            yield Running(words[0], words[3], process.pid)
        finally:
            process.terminate()


def main() -> None:
    """Measure, print the result and write it."""
    args = arguments(__doc__ or "", engine=True)
    sizes = {SHORT: 48, LONG: 16} if args.quick else {SHORT: 192, LONG: 96}
    rounds = 1 if args.quick else 4
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folders = {SHORT: FOLDER, LONG: Path(temporary) / "endless"}
        write_endless(folders[LONG])
        for length, folder in folders.items():
            chat = load_chat(folder, device="cpu")
            options = {"num_beams": 1, "max_new_tokens": MAX_TOKENS}
            texts = {
                (path.name, question): chat.ask(path, question, **options).text for path, question in find_examples()
            }
            questions = list(islice(cycle(texts), sizes[length]))
            best: dict[tuple[int, str], float] = {}
            cpu: dict[tuple[int, str], float] = {}
            peak: dict[tuple[int, str], int] = {}  # peak memory so far, in MiB
            equal: dict[tuple[int, str], bool] = {}
            with ExitStack() as stack:
                start = partial(server, folder, device=args.device)
                servers = {ONE: stack.enter_context(start(max_rows=1)), TOGETHER: stack.enter_context(start())}
                if args.engine is not None and length == SHORT:
                    servers[ENGINE] = stack.enter_context(start("--engine", args.engine))
                for running in servers.values():
                    running.answer(list(texts), 8)  # warm-up: the clips are encoded
                for num_clients in CLIENTS:
                    asked = questions if num_clients > 1 else questions[: len(questions) // 4]
                    for _ in range(rounds):  # in turns, so that a slow minute affects all servers
                        for name, running in servers.items():
                            seconds, worked, answers = running.answer(asked, num_clients)
                            place = num_clients, name
                            best[place] = max(best.get(place, 0.0), len(asked) / seconds)
                            cpu[place] = min(cpu.get(place, math.inf), worked / len(asked))
                            peak[place] = resident_bytes("VmHWM", running.pid) >> 20
                            right = answers == [texts[question] for question in asked]
                            equal[place] = equal.get(place, True) and right
            rows += [
                {
                    "answers": length,
                    "": name,
                    "clients": str(num_clients),
                    "equal": "yes" if equal[num_clients, name] else "no",
                    "answers/s": rate,
                    "speed-up": rate / best[num_clients, ONE],
                    "server CPU ms": 1000 * cpu[num_clients, name],
                    "server MiB": peak[num_clients, name],
                }
                for (num_clients, name), rate in best.items()
            ]
    report(
        "serve",
        "the same server, one question in each generation",
        rows,
        {"questions": sizes, "rounds": rounds, "model": FOLDER.name},
        args.output_dir,
    )


if __name__ == "__main__":
    main()
