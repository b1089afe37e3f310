"""TOMATO: six tasks (such as count, direction and rotation) that a single frame cannot answer. arXiv 2410.23266.

data/<task>.json, videos/<demonstration_type>/<key>.mp4
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from string import ascii_uppercase

from stllm.common.errors import UserError
from stllm.common.registry import benchmarks
from stllm.common.schema import EvaluationSettings
from stllm.conversation.requests import Request
from stllm.datasets.annotations import text_of
from stllm.datasets.faults import Fault, check_item, shortened
from stllm.evaluation.benchmarks.base import Benchmark, Entry, Item, Record
from stllm.evaluation.benchmarks.ground_truth import (
    MediaFolders,
    Search,
    chosen_tasks,
    find_files,
    open_requests,
    read_mapping,
    root_of,
)
from stllm.evaluation.scores import chosen_option
from stllm.processors.templates import PromptTemplate

TASKS = ("count", "direction", "rotation", "shape&trend", "velocity&frequency", "visual_cues")
EXPECTED = "TOMATO's {id: {question, options, answer, key, demonstration_type, motion_type}}"
DATA = "data"  # folder of the tasks' files
GROUPS = ("motion_type", "demonstration_type")
PROMPT = (
    "You will be provided with {n} separate frames uniformly sampled from a video, the frames are provided in "
    "chronological order of the video. Analyze these frames and provide the answer to the question about the video "
    "content. Answer the multiple-choice question about the video content. \n\n"
    "You must use these frames to answer the multiple-choice question; do not rely on any externel knowledge or "
    "commonsense. \n\n"
    "<question> \n{q} \n</question>\n\n<options> \n{options} \n</options>\n\n"
    "Even if the information in these separate frames is not enough to answer the question, PLEASE TRY YOUR BEST TO "
    "GUESS AN ANSWER WHICH YOU THINK WOULD BE THE MOST POSSIBLE ONE BASED ON THE QUESTION. \n\n"
    "DO NOT GENERATE ANSWER SUCH AS 'NOT POSSIBLE TO DETERMINE.' \n"
)


class Tomato(Benchmark):
    """The benchmark TOMATO. Its tasks are those whose files exist in the folder."""

    name, title = "tomato", "TOMATO"
    ground_truth = "its folder, which holds data and videos"
    finds_media = True
    rules = (
        'The official rule accepts a letter, "A: text" or "Answer is (A)". For any other reply it takes a random '
        "letter (here one that depends on the item's id; the official script first asks a language model). The strict "
        "rule does not guess: it accepts the letter or the option's text, and counts any other reply as wrong."
    )

    def load(self, path: Path, settings: EvaluationSettings) -> Iterator[Entry | Fault]:
        """Read the configured tasks. path: the benchmark's folder, its folder `data`, or a file there."""
        files = find_files(path, self.title, {task: f"{task}.json" for task in TASKS}, (DATA, ""))
        if settings.num_frames == 0:
            raise UserError("tomato: num_frames is 0, but its prompt names their number: give --num-frames 1 or more")
        media = MediaFolders(settings.video_dir or root_of(files, DATA) / "videos", settings)
        for task in chosen_tasks(list(files), settings):
            for id, fields in read_mapping(files[task], EXPECTED).items():
                where = f"{files[task]}, {id}"
                if not isinstance(fields, dict) or "options" not in fields:
                    sentence = f"found {shortened(fields)}, expected {EXPECTED}"
                    yield Fault("annotation", where, "record", sentence)
                    continue
                options, number = fields["options"], fields.get("answer")
                texts = tuple(text_of(text) or "" for text in options) if isinstance(options, list) else ()
                answer = texts[number] if type(number) is int and 0 <= number < len(texts) else ""
                names = [text_of(fields.get(key)) or "" for key in ("demonstration_type", "key")]
                item = Item(
                    id=f"{task}/{id}",
                    task=task,
                    video="/".join(names) + ".mp4" if all(names) else "",
                    media=None,
                    questions=(text_of(fields.get("question")) or "",),
                    answer=answer,
                    candidates=texts,
                    fields=fields,
                    groups={kind.replace("_", " "): (text_of(fields.get(kind)) or "none",) for kind in GROUPS},
                )
                findings = list(check_item({**fields, "answer": answer or number, "video": item.video}, where))
                if not 2 <= len(texts) <= len(ascii_uppercase) or not all(texts):
                    sentence = f"found {shortened(options)}, expected a list of 2 to 26 texts: correct it"
                    findings.insert(0, Fault("candidates", where, "options", sentence))
                elif not answer:
                    sentence = f"found {shortened(number)}, expected a number from 0 to {len(texts) - 1}: correct it"
                    findings.insert(0, Fault("candidates", where, "answer", sentence))
                yield media.entry(item, findings, Search(stems=["/".join(names)]))

    def ask(self, item: Item, template: PromptTemplate, system: str | None) -> tuple[Request, ...]:
        """Return the request. Its prompt has the number of frames, and the options as a Python dictionary."""
        options = dict(zip(ascii_uppercase, item.candidates, strict=False))
        num_frames = "{n}" if item.media is None else item.media.num_frames
        prompt = PROMPT.format(n=num_frames, q=item.questions[0], options=options)
        return open_requests(replace(item, questions=(prompt,)), system)

    def score(self, item: Item, predictions: Sequence[str]) -> Record:
        """Return `correct` and `parsed` by the official and the strict rule."""
        said = predictions[0].strip()
        letters = ascii_uppercase[: len(item.candidates)]
        parsed = {"official": official_option(said, item.candidates)}
        parsed["strict"] = chosen_option(said, item.candidates) if parsed["official"] is None else parsed["official"]
        draw = int.from_bytes(hashlib.blake2b(item.id.encode(), digest_size=8).digest(), "little") % len(letters)
        chosen = {**parsed, "official": draw if parsed["official"] is None else parsed["official"]}
        return {
            "correct": {rule: n is not None and item.candidates[n] == item.answer for rule, n in chosen.items()},
            "parsed": {rule: n is not None for rule, n in parsed.items()},
        }


benchmarks.register(Tomato.name)(Tomato())


def official_option(said: str, candidates: Sequence[str]) -> int | None:
    """Return the index of the option that the official rule finds in a reply, or None."""
    for number, (letter, text) in enumerate(zip(ascii_uppercase, candidates, strict=False)):
        if said.upper() == letter or said == f"{letter}: {text}":
            return number
        if (named := re.fullmatch(r"Answer is:? *\(?([A-Za-z])\)?", said)) and named[1].upper() == letter:
            return number
    return None
