"""ST-LLM as a model of lmms-eval (0.7): with both packages installed, lmms-eval knows it by the name `st_llm`.

    pip install ".[lmms-eval]"
    lmms-eval --model st_llm --model_args pretrained=DIR,num_frames=16 --tasks mvbench --batch_size 8

lmms-eval finds it by the entry point that pyproject.toml names; nothing of lmms-eval needs to be changed. Several GPUs:
torchrun or accelerate launch, as lmms-eval documents it; each process takes its own. This module is imported in every
run of lmms-eval, so that everything heavy is imported where the model is loaded.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from stllm.common.errors import UserError, unknown_name
from stllm.common.schema import PUBLISHED
from stllm.conversation.decoding import Decoding
from stllm.conversation.requests import Media, Prepared, Request, RequestError
from stllm.media.info import MediaError
from stllm.media.open import open_media
from stllm.processors.templates import Turn

logger = logging.getLogger(__name__)

NAME = "st_llm"
ARGUMENTS = (
    *("pretrained", "cfg_path", "device", "dtype", "batch_size", "num_frames", "sampling", "reader", "system"),
    "context",
)
# The answer to a request that cannot be answered. It must be wrong by every metric: it is not empty, which some metrics
# leave out or count as right; it has no letter of an option, no digit and no word, so that no correct answer is a part
# of it; and it survives the removal of marks and capitals.
UNANSWERED = "zxqzxq"
NOT_THERE = (FileNotFoundError, NotADirectoryError, PermissionError)  # raised by a task's own code that looks for media
KNOWN_SETTINGS = ("until", "max_new_tokens", "num_beams", "temperature", "do_sample", "top_p", "repetition_penalty")


def manifest() -> ModelManifest:
    """The model's entry in lmms-eval's registry."""
    return ModelManifest(model_id=NAME, chat_class_path=f"{__name__}.STLLMForHarness")


class Settings(NamedTuple):
    """A task's generation settings: how the answer is generated, and at which texts it is cut."""

    decoding: Decoding
    until: tuple[str, ...]


class STLLMForHarness(lmms):
    """The model as lmms-eval calls it. The arguments are those of --model_args, as text or as numbers.

    pretrained: weights of any layout that `stllm chat` reads. cfg_path: the model's YAML, default: what the checkpoint
        says. device, dtype: as everywhere in stllm. batch_size: questions answered at once.
    num_frames: taken from each video; default: the checkpoint's own number, else 64 for global-local models and 16 for
        others. sampling: the rule that chooses them (media/sampling.py). reader: auto, pyav, decord or torchcodec.
    system: "template" for the model family's own system sentence, "none", or a file with another; a task's own wins.
    context: the rule for long prompts, `published` or `all`; see conversation/requests.py.
    Raises UserError for what cannot be loaded.
    """

    is_simple = False  # its tasks come as messages

    def __init__(
        self,
        pretrained: str,
        cfg_path: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int | str = 1,
        num_frames: int | str | None = None,
        sampling: str = "uniform",
        reader: str = "auto",
        system: str = "template",
        context: str = PUBLISHED,
        **unknown: Any,
    ) -> None:
        super().__init__()
        unknown.pop("max_batch_size", None)  # of lmms-eval's search for a batch size
        if unknown:
            raise UserError(unknown_name("model argument", min(unknown), ARGUMENTS))
        from stllm.conversation.chat import load_chat

        frames = None if num_frames is None else _number("num_frames", num_frames)
        self.batch_size = _number("batch_size", batch_size)
        self.chat = load_chat(
            pretrained, cfg_path=cfg_path, device=device, dtype=dtype, num_frames=frames, context=context
        )
        self.sampling, self.reader = sampling, reader
        known: dict[str, str | None] = {"template": self.chat.processor.template.system, "none": ""}
        self.system = known[system] if system in known else self._resolve_system_prompt(system)

    @property
    def device(self) -> Any:
        """The model's torch device."""
        return self.chat.model.device

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return the answers, in the order of the requests.

        requests: instances with (context, doc_to_messages, generation settings, document's number, task, split).
        A request that cannot be answered, such as one with an unreadable video, gets `UNANSWERED`, since lmms-eval
        scores every answer; a warning names it, and another one at the end counts them by task.
        Raises UserError for a task that is not for this model.
        """
        unanswered: Counter[str] = Counter()
        groups: dict[Settings, list[int]] = {}
        for position, request in enumerate(requests):
            settings = settings_of(request.args[2], self.chat.decoding)
            groups.setdefault(settings, []).append(position)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc=NAME, disable=self.rank != 0) as bar:
            for settings, positions in groups.items():
                for first in range(0, len(positions), self.batch_size):
                    batch = positions[first : first + self.batch_size]
                    answers = self._answer([requests[position].args for position in batch], settings)
                    for position, text in zip(batch, answers, strict=True):
                        texts[position] = UNANSWERED if text is None else text
                        unanswered[requests[position].args[4]] += text is None
                    bar.update(len(batch))
        if unanswered.total():
            counts = ", ".join(f"{task} {count}" for task, count in unanswered.items() if count)
            logger.warning(
                f"{unanswered.total()} of {len(requests)} requests could not be answered ({counts}): their answer is "
                f"{UNANSWERED!r}, which is scored as wrong; the warnings above name them"
            )
        return texts

    def _answer(self, arguments: Sequence[tuple[Any, ...]], settings: Settings) -> list[str | None]:
        """Return the answers to some requests, None for one that cannot be answered."""
        texts: list[str | None] = [None] * len(arguments)
        with TemporaryDirectory(prefix="stllm_lmms_eval_") as folder:
            read = [
                self._prepared(one, settings.decoding, Path(folder) / str(number))
                for number, one in enumerate(arguments)
            ]
        prepared = {number: one for number, one in enumerate(read) if one is not None}
        for with_media in (True, False):  # a batch is of one kind
            numbers = [number for number, one in prepared.items() if (one.visual is not None) == with_media]
            answers = self.chat.complete([prepared[number] for number in numbers], settings.decoding)
            for number, answer in zip(numbers, answers, strict=True):
                texts[number] = cut(answer.text, settings.until)
        return texts

    def _prepared(self, arguments: tuple[Any, ...], decoding: Decoding, folder: Path) -> Prepared | None:
        """Read and encode a request's medium; None, with a warning, if it cannot be answered.

        A warning names a request whose prompt was cut, too.
        """
        _, doc_to_messages, _, doc_id, task, split = arguments
        try:
            messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id])).messages
            prepared = self.chat.prepare(self._request(messages, folder), decoding)
        except (RequestError, MediaError, *NOT_THERE) as error:
            logger.warning("%s, document %s: %s", task, doc_id, error)
            return None
        if prepared.cut.total:
            logger.warning("%s, document %s: %s", task, doc_id, prepared.cut)
        return prepared

    def _request(self, messages: Sequence[Any], folder: Path) -> Request:
        """Turn a task's messages into a conversation about one medium. folder: for pictures that are no files."""
        turns: list[Turn] = []
        system, visuals = self.system, []
        for message in messages:
            text = "\n".join(part.text for part in message.content if part.type == "text")
            visuals += [part for part in message.content if part.type != "text"]
            if message.role == "system":
                system = text
            elif message.role == "user":
                turns.append(Turn(text))
            elif turns:
                turns[-1] = replace(turns[-1], answer=text)
        if not turns or turns[-1].answer is not None:
            raise UserError("a task's messages end with no question; expected the user's to be the last")
        return Request(tuple(turns), self._medium(visuals, folder) if visuals else None, system)

    def _medium(self, visuals: Sequence[Any], folder: Path) -> Media:
        """One video, one image, or several pictures, which are taken for the frames of one video.

        Raises MediaError for a picture that cannot be read.
        """
        kinds, frames = [visual.type for visual in visuals], Media("-", sampling=self.sampling, reader=self.reader)
        if kinds == ["video"]:
            url, start, end = visuals[0].url, visuals[0].start_time, visuals[0].end_time
            if isinstance(url, Mapping):  # the harness' other spelling of a part
                start, end = url.get("video_start"), url.get("video_end")
                url = next((url[key] for key in ("url", "path", "video") if key in url), url)
            if not isinstance(url, str):
                raise UserError(
                    f"a task's video is a {type(url).__name__}; expected the path of a file or of a frame folder"
                )
            return replace(frames, path=url, start=start, end=end)
        if set(kinds) != {"image"}:
            raise UserError(f"a task shows {', '.join(kinds)} at once; {NAME} sees one video, or pictures of one")
        pictures = [visual.url for visual in visuals]
        if len(pictures) == 1 and isinstance(pictures[0], str):
            return replace(frames, path=pictures[0])

        from PIL import Image

        folder.mkdir()
        file = folder
        for number, picture in enumerate(pictures, start=1):  # a folder of numbered frames
            file = folder / f"{number:05d}.png"
            if isinstance(picture, str):
                with open_media(picture) as opened:
                    Image.fromarray(next(opened.frames([opened.info.first_index]))).save(file)
            else:
                picture.convert("RGB").save(file)
        return Media(str(file if len(pictures) == 1 else folder), sampling=self.sampling)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refuse: it is not offered."""
        raise UserError(
            f"{NAME} answers in words; tasks of log-likelihoods (output_type loglikelihood or multiple_choice) are not "
            "for it: choose a task of generate_until"
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refuse: it is not offered."""
        raise UserError(f"{NAME} answers once; tasks of output_type generate_until_multi_round are not for it")

    def clean(self) -> None:
        """Free the model's memory, for a judge on the same machine."""
        self.__dict__.pop("chat", None)
        super().clean()


def settings_of(given: Mapping[str, Any], usual: Decoding) -> Settings:
    """Read a task's generation settings.

    What it does not name: one beam, no sampling; the length and the repetition penalty of the model family's published
    settings (`usual`). A setting that is not known is noted and changes nothing.
    """
    unknown = sorted(name for name, value in given.items() if name not in KNOWN_SETTINGS and value is not None)
    if unknown:
        logger.warning("generation_kwargs of no meaning to %s are left out: %s", NAME, ", ".join(unknown))
    wanted = {name: value for name, value in given.items() if value is not None}
    temperature = float(wanted.get("temperature", 1.0 if wanted.get("do_sample") else 0.0))
    decoding = replace(
        usual,
        num_beams=int(wanted.get("num_beams", 1)),
        max_new_tokens=int(wanted.get("max_new_tokens", usual.max_new_tokens)),
        temperature=temperature if wanted.get("do_sample", True) else 0.0,
        top_p=float(wanted.get("top_p") or 1.0),
        repetition_penalty=float(wanted.get("repetition_penalty", usual.repetition_penalty)),
    )
    until = wanted.get("until", ())
    return Settings(decoding, (until,) if isinstance(until, str) else tuple(until))


def cut(text: str, until: Iterable[str]) -> str:
    """Return the text before the first of these ends, which are not part of an answer."""
    for end in until:
        if end:
            text = text.split(end, 1)[0]
    return text


def _number(name: str, value: int | str) -> int:
    try:
        number = int(value)
    except ValueError:
        number = 0
    if number < 1:
        raise UserError(f"--model_args: {name} is {value!r}; expected a whole number, at least 1")
    return number
