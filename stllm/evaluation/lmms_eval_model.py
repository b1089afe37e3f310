"""ST-LLM as the model `st_llm` of lmms-eval (0.7).

    pip install ".[lmms-eval]"
    lmms-eval --model st_llm --model_args pretrained=DIR,num_frames=16 --tasks mvbench --batch_size 8

lmms-eval finds the model by an entry point in pyproject.toml, so lmms-eval itself is not changed. For several GPUs, use
torchrun or accelerate launch as lmms-eval documents; each process uses one GPU. Every run of lmms-eval imports this
module, so heavy modules are imported only when the model is loaded.
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
# The text returned for a request that cannot be answered. Every metric must count it as wrong. So it is not empty (some
# metrics ignore empty answers or count them as right); it contains no option letter, digit or word, so no correct
# answer is part of it; and removing punctuation and capitals does not change it.
UNANSWERED = "zxqzxq"
NOT_THERE = (FileNotFoundError, NotADirectoryError, PermissionError)  # raised by a task's own code for missing media
KNOWN_SETTINGS = ("until", "max_new_tokens", "num_beams", "temperature", "do_sample", "top_p", "repetition_penalty")


def manifest() -> ModelManifest:
    """Return the model's entry for lmms-eval's registry."""
    return ModelManifest(model_id=NAME, chat_class_path=f"{__name__}.STLLMForHarness")


class Settings(NamedTuple):
    """A task's generation settings. until: texts before which the answer is cut off."""

    decoding: Decoding
    until: tuple[str, ...]


class STLLMForHarness(lmms):
    """ST-LLM with lmms-eval's model interface. The arguments are those of --model_args, as text or as numbers.

    pretrained: weights in any format that `stllm chat` reads. cfg_path: the model's YAML; default: settings from the
        checkpoint. device, dtype: as in stllm's commands. batch_size: questions answered at once.
    num_frames: frames per video; default: the checkpoint's number, else 64 for models with the global-local module and
        16 for others. sampling: the rule that selects frames (media/sampling.py).
    reader: auto, pyav, decord or torchcodec.
    system: "template" for the model family's system message, "none", or a file that contains one. A task's own system
        message overrides it.
    context: the rule for long prompts, `published` or `all`; see conversation/requests.py.
    Raises UserError if the model cannot be loaded.
    """

    is_simple = False  # requests contain chat messages

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
        unknown.pop("max_batch_size", None)  # passed by lmms-eval for its batch size search, which is not supported
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
        """Return the model's torch device."""
        return self.chat.model.device

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return the answers in the order of the requests.

        requests: instances with (context, doc_to_messages, generation settings, document number, task, split).
        The answer to a request that fails, such as for an unreadable video, is `UNANSWERED`, because lmms-eval scores
        every answer. A warning names the request; a last warning gives the number of such requests per task.
        Raises UserError for a task that this model does not support.
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
        """Answer a batch of requests; None for a request that cannot be answered."""
        texts: list[str | None] = [None] * len(arguments)
        with TemporaryDirectory(prefix="stllm_lmms_eval_") as folder:
            read = [
                self._prepared(one, settings.decoding, Path(folder) / str(number))
                for number, one in enumerate(arguments)
            ]
        prepared = {number: one for number, one in enumerate(read) if one is not None}
        for with_media in (True, False):  # a batch has only requests with media, or only requests without
            numbers = [number for number, one in prepared.items() if (one.visual is not None) == with_media]
            answers = self.chat.complete([prepared[number] for number in numbers], settings.decoding)
            for number, answer in zip(numbers, answers, strict=True):
                texts[number] = cut(answer.text, settings.until)
        return texts

    def _prepared(self, arguments: tuple[Any, ...], decoding: Decoding, folder: Path) -> Prepared | None:
        """Read and encode a request's medium and prepare its prompt. folder: for temporary images.

        If the request cannot be answered, warn and return None. Also warn if the prompt was cut.
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
        """Convert a task's messages into a conversation about one medium. folder: for images that are not files."""
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
        """Return the medium: one video, one image, or several images, which become the frames of one video.

        folder: for images that are not files. Raises MediaError for an unreadable image.
        """
        kinds, frames = [visual.type for visual in visuals], Media("-", sampling=self.sampling, reader=self.reader)
        if kinds == ["video"]:
            url, start, end = visuals[0].url, visuals[0].start_time, visuals[0].end_time
            if isinstance(url, Mapping):  # lmms-eval's other way to pass a video with start and end
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
        """Raise UserError: log-likelihood tasks are not supported."""
        raise UserError(
            f"{NAME} answers in words; tasks of log-likelihoods (output_type loglikelihood or multiple_choice) are not "
            "for it: choose a task of generate_until"
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Raise UserError: tasks with several rounds are not supported."""
        raise UserError(f"{NAME} answers once; tasks of output_type generate_until_multi_round are not for it")

    def clean(self) -> None:
        """Free the model's memory, so that a judge can use it."""
        self.__dict__.pop("chat", None)
        super().clean()


def settings_of(given: Mapping[str, Any], usual: Decoding) -> Settings:
    """Convert a task's generation settings. An unknown setting is ignored with a warning.

    given: lmms-eval's generation_kwargs. usual: the model family's published settings; length and repetition penalty
    default to them. Other defaults are one beam and no sampling.
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
    """Return the text up to the first occurrence of any of these end texts."""
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
