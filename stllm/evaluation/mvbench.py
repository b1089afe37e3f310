"""MVBench: twenty tasks of multiple choice about time in videos, asked and matched as published.

Source: arXiv 2311.17005 for data and matching, arXiv 2404.00308 for the prompt. Tasks of one's own, in the same form,
are asked alike.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from stllm.common.errors import UserError
from stllm.common.evaluation_section import EvaluationSettings
from stllm.common.registry import benchmarks
from stllm.conversation.choices import ANSWER_BEGINS, REQUEST, SYSTEM, question_block
from stllm.conversation.requests import Request
from stllm.conversation.templates import PromptTemplate, Turn
from stllm.datasets.annotations import Fields, text_of
from stllm.datasets.doctor_checks import Fault, Finding, check_mvbench
from stllm.evaluation.ground_truth import MediaFolders, chosen_tasks, examined, read_records, system_of
from stllm.evaluation.items import Item, Record
from stllm.evaluation.matching import gold_option, official_match, strict_match
from stllm.evaluation.mvbench_tasks import TASKS, MVBenchLayout, MVBenchTask, task_of
from stllm.evaluation.tallies import RULES, by_task, tally

ANSWER_MARK = "###Assistant: "
Numbered = tuple[str, str, Fields]  # id, file and record, fields


@dataclass(frozen=True)
class MVBench:
    """The benchmark, read. See `items.Benchmark`. system: the sentence before the question, "" for none.

    An item without a usable record or medium has `media` None and says why; a task without any medium is `excluded`.
    """

    items: Sequence[Item]
    excluded: Mapping[str, str]
    num_excluded: int
    system: str = SYSTEM
    name: str = field(default="mvbench", init=False)

    def requests(self, item: Item, template: PromptTemplate) -> tuple[Request, ...]:
        """The one request; the Q-Former reads the question block alone."""
        block = question_block(item.questions[0], item.candidates)
        pieces = prompt_pieces(block, self.system, template)
        return (Request(turns=(Turn(block),), media=item.media, pieces=pieces),)

    def fields(self, item: Item, predictions: Sequence[str]) -> Record:
        """`prediction`: as the official script has it, "(" (with which the prompt ends) and the reply's first line;
        `gold`: the right option, in its form; `correct`: by either rule."""
        prediction = "(" + predictions[0].split("\n")[0]
        gold = gold_option(item.candidates, item.answer)
        correct = {
            "official": official_match(prediction, gold),
            "strict": strict_match(prediction, item.candidates, item.answer),
        }
        return {"prediction": prediction, "gold": gold, "correct": correct}

    def scores(self, records: Sequence[Record]) -> dict[str, Any]:
        """Percent, by either rule: {"official": ..., "strict": ..., "differing": ids on which the rules differ}.

        Of each rule: `average` and `tasks` over all items that were asked, failed ones wrong; `average_answered` and
        `tasks_answered` over those that were answered, None where there is none. Averages are over items, not tasks.
        """
        tasks = {name: tally(lines) for name, lines in by_task(records).items()}
        total = tally(records)
        scores: dict[str, Any] = {
            rule: {
                "average": total.over_all(rule),
                "average_answered": total.over_answered(rule),
                "tasks": {name: task.over_all(rule) for name, task in tasks.items()},
                "tasks_answered": {name: task.over_answered(rule) for name, task in tasks.items()},
            }
            for rule in RULES
        }
        answered = [line for line in records if not line.get("error")]
        differing = [line["id"] for line in answered if line["correct"]["official"] != line["correct"]["strict"]]
        return {**scores, "differing": differing}

    def official(self, records: Sequence[Record]) -> Mapping[str, Any]:
        """`acc_dict`: [right, asked] by the official rule, failed items among those asked; `res_list`: the answered
        ones, since an empty prediction would be right in the official script."""
        tallies = {name: tally(lines) for name, lines in by_task(records).items()}
        accuracies = {name: [task.right["official"], task.asked] for name, task in tallies.items()}
        results = [
            {"pred": line["prediction"], "gt": line["gold"], "id": line["id"], "task_type": line["task"]}
            for line in records
            if not line.get("error")
        ]
        return {"": {"acc_dict": accuracies, "res_list": results}}


def prompt_pieces(block: str, system: str, template: PromptTemplate) -> tuple[str, ...]:
    """The prompt that ends in "Best option:(", as pieces of `Request`.

    The InstructBLIP family's is the published one. For the MiniGPT-4 family none was published: the same words stand
    where that template has its question, which is our choice.
    """
    *before, last = template.opening
    assert last.endswith(f" {ANSWER_MARK}"), last
    opening = (*before, last.removesuffix(f" {ANSWER_MARK}") + ANSWER_MARK + ANSWER_BEGINS)
    text = "".join(f"{part}\n" for part in (system, block, REQUEST) if part)
    return tuple(replace(template, opening=opening).render(Turn(text), first=True, media="video"))


@benchmarks.register("mvbench")
def mvbench(settings: EvaluationSettings) -> MVBench:
    """Reads the annotation files and looks for their media. Raises UserError."""
    if settings.anno_path is None:
        raise UserError("mvbench: no ground truth was named: give MVBench's folder, which holds json and video")
    layout = MVBenchLayout.of(settings.anno_path, settings.video_dir)
    if not layout.files:
        raise UserError(
            f"{settings.anno_path}: found no JSON file, expected MVBench's folder with json and video in it (such as "
            f"json/{TASKS[0].file}): name that folder"
        )
    files = {file.stem: file for file in sorted(layout.files, key=_place)}
    records = {slug: list(_numbered(files[slug])) for slug in chosen_tasks(list(files), settings)}
    media = MediaFolders(layout.media, settings)
    items: list[Item] = []
    excluded: dict[str, str] = {}
    num_excluded = 0
    for slug, of_file in records.items():
        of_task = _task_items(files[slug], of_file, media)
        asked = of_task[: settings.limit]
        if any(item.media for item in of_task):
            items += asked
        else:
            reason = f"none of its {len(of_task)} items can be asked, the first one because: {of_task[0].error}"
            excluded[of_task[0].task] = reason
            num_excluded += len(asked)
    if not items:
        reason = next(iter(excluded.values()))
        raise UserError(
            f"{settings.anno_path}: no task has media to be asked about; of {next(iter(excluded))} {reason}"
        )
    return MVBench(items=items, excluded=excluded, num_excluded=num_excluded, system=system_sentence(settings))


def _task_items(file: Path, records: Sequence[Numbered], media: MediaFolders) -> list[Item]:
    """An item a record, those that cannot be asked among them. A file of another name is a task of one's own: its media
    lie in the media folder itself, and count from start to end where these are given."""
    task = task_of(file)
    if task is None:
        own = MVBenchTask(name=file.stem.replace("_", " ").replace("-", " ").title(), folder="")
        return [_item(own, own.folders, True, media, *record) for record in records]
    # what lies in the media folder itself was put there by hand
    return [_item(task, (*task.folders, ""), task.bounded, media, *record) for record in records]


def _numbered(file: Path) -> Iterator[Numbered]:
    for number, (where, fields) in enumerate(read_records(file, "mvbench")):
        yield f"{file.stem}/{number}", where, fields


def _item(
    task: MVBenchTask, folders: Sequence[str], bounded: bool, media: MediaFolders, id: str, where: str, fields: Fields
) -> Item:
    findings = check_mvbench(fields, where, media=task.media, bounded=task.bounded, fps=task.fps)
    medium, error = examined(finding for finding in findings if not _is_harmless(finding, fields))
    candidates = fields.get("candidates")
    if not error and len(fields["candidates"]) > len(ascii_uppercase):
        error = f"{where}: found {len(fields['candidates'])} candidates, expected at most one a letter: leave some out"
    found = None
    if not error and medium is not None:
        found = media.find(medium, folders, bounded=bounded)
        error = "" if found else media.missing(medium.name, folders)
    return Item(
        id=id,
        task=task.name,
        video=text_of(fields.get("video")) or "",
        media=found,
        questions=(text_of(fields.get("question")) or "",),
        answer=text_of(fields.get("answer")) or "",
        candidates=tuple(text_of(option) or "" for option in candidates) if isinstance(candidates, list) else (),
        fields=fields,
        error=error,
    )


def _is_harmless(finding: Finding, fields: Fields) -> bool:
    """An option that stands there twice leaves the item as the official script has it."""
    if not isinstance(finding, Fault) or finding.kind != "candidates":
        return False
    options = fields["candidates"]
    return isinstance(options, list) and 1 < len(options) <= len(ascii_uppercase) and fields.get("answer") in options


def _place(file: Path) -> tuple[int, str]:
    """Tasks in the order of the benchmark's table, others after them."""
    task = task_of(file)
    return (len(TASKS) if task is None else TASKS.index(task), file.name)


def system_sentence(settings: EvaluationSettings) -> str:
    """The sentence in the prompt: the benchmark's own unless the settings have a text, or "" for none."""
    return SYSTEM if (system := system_of(settings)) is None else system
