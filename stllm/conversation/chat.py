"""A loaded model that answers questions about videos and images, for chat, demos and benchmarks.

Steps: read -> encode -> prepare (prompt and visual tokens) -> complete; `answer` takes them all.
A video is read and encoded once; the encoder's output is kept (content-keyed, bounded) for further questions, and only
the parts that depend on the question run again. Letters: N visual tokens, D width of the language model.
"""

import argparse
import logging
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from inspect import signature
from pathlib import Path
from threading import Event, Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stllm.common.errors import UserError, out_of_memory, unknown_name
from stllm.common.jsonl import loads
from stllm.conversation.decoding import Decoding, NaNWatch, NoNumbersError
from stllm.conversation.requests import (
    Answer,
    ClipReader,
    FeatureCache,
    Media,
    Prepared,
    Request,
    Seen,
    Stamp,
    Together,
    num_positions,
)
from stllm.media.clip import Clip
from stllm.models.configuration import STLLMConfig
from stllm.models.generation import weights_state
from stllm.models.settings import explicit_settings
from stllm.models.st_llm import STLLM, config_of
from stllm.processors.prompts import PromptProcessor
from stllm.processors.sequences import IGNORE_INDEX, VISUAL_TOKEN_ID, pad_sequences
from stllm.processors.templates import Turn
from stllm.processors.transforms import EvalTransform

if TYPE_CHECKING:
    from stllm.conversation.evidence import Evidence
    from stllm.conversation.remote import RemoteLanguageModel
    from stllm.conversation.streaming import Batches

log = logging.getLogger(__name__)

DEFAULT_CACHE_BYTES = 2 << 30
MAX_KNOWN_FILES = 10_000
FOLDER = Path(__file__).parents[1] / "assets" / "stllm-tiny"  # the embedded model, the default
EXAMPLES = FOLDER.with_name("examples")  # clips that it answers well
KNOWS = "it knows only the toy world: a few coloured shapes that move, blink and change, in short clips"
SHORT_CLIP_FRAMES, LONG_CLIP_FRAMES = 16, 64  # published: 64 frames go with the global-local module, 16 without


class Chat:
    """A loaded model that answers questions.

    decoding: None for the published settings of this family. cache_bytes: room for encoded videos in main memory, and
    for keys and values of prompts about them, which stay where the language model is; 0: neither is kept.
    engine: a server that decodes in place of this model's language model, of which the token embedding is enough here.
    """

    def __init__(
        self,
        *,
        model: STLLM,
        processor: PromptProcessor,
        decoding: Decoding | None = None,
        num_frames: int | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        engine: "RemoteLanguageModel | None" = None,
    ) -> None:
        self.model = model.eval()
        self.engine = engine
        self.processor = processor
        self.decoding = decoding or Decoding.published(processor.template)
        self.num_frames = num_frames or default_num_frames(config_of(model))
        self.read = ClipReader(EvalTransform(model.config.vision_config["image_size"]), self.num_frames)
        self.cache = FeatureCache(cache_bytes)
        self._known: dict[Stamp, tuple[str, str, list[float]]] = {}  # stamp -> digest, kind, times
        self.lock = Lock()  # one generation at a time
        self._question_tokens: Together[tuple[str, Tensor], Tensor] = Together(self._tokens_of)
        self._warned = False  # whether a prompt beyond the positions was warned about

    @cached_property
    def batches(self) -> "Batches":
        """The questions that wait for the language model."""
        from stllm.conversation.streaming import Batches

        return Batches(self._generate, self.processor, self.model.dtype)

    # ---- asking -----------------------------------------------------------------------------------------------------

    def ask(self, path: str | Path | None, question: str, **options: Any) -> Answer:
        """Answer one question. path: video, gif, frame folder or image; None for text alone.

        options: `Media` fields (num_frames, start, end, ...) and `Decoding.with_options` ones (num_beams, ...).
        Raises UserError (MediaError for an unreadable file).
        """
        return self.conversation(path, **options).ask(question)

    def conversation(self, path: str | Path | None = None, **options: Any) -> "Conversation":
        """Begin a conversation of several turns about one video; options as for `ask`."""
        known = {*Media.__dataclass_fields__, *signature(Decoding.with_options).parameters} - {"path", "self"}
        for name in options:
            if name not in known:
                raise UserError(unknown_name("option", name, known))
        media_options = {name: options.pop(name) for name in list(options) if name in Media.__dataclass_fields__}
        media = None if path is None else Media(path=str(path), **media_options)
        return Conversation(chat=self, media=media, decoding=self.decoding.with_options(**options))

    def evidence(self, path: str | Path, question: str, answer: str | None = None, **options: Any) -> "Evidence":
        """Measure what an answer rests on, over time; the model's own answer by default. Options as for `ask`."""
        from stllm.conversation.evidence import measure_evidence

        conversation = self.conversation(path, **options)
        return measure_evidence(self, conversation.request(question), answer, decoding=conversation.decoding)

    def answer(self, requests: Sequence[Request], decoding: Decoding | None = None) -> list[Answer]:
        """Answer a batch of requests in one generation; the answers are the same as one at a time."""
        return self.complete([self.prepare(request, decoding) for request in requests], decoding)

    def stream(self, request: Request, decoding: Decoding) -> Generator[str, None, None]:
        """Yield the answer's text piece by piece. Closing the iterator ends the generation. Raises UserError."""
        decoding.check_streaming()
        prepared = self.prepare(request, decoding)
        if prepared.cut.total:
            log.warning("%s", prepared.cut)
        yield from self.stream_prepared(prepared, decoding)

    def stream_prepared(
        self, prepared: Prepared, decoding: Decoding, stop: Event | None = None
    ) -> Generator[str, None, Tensor]:
        """Do the same for a prepared request. Returns the new ids, (1, A).

        It is answered together with others that wait and have the same settings. stop: ends it, too, when it is set.
        """
        from stllm.conversation.streaming import clean_pieces

        decoding.check_streaming()
        stop = stop or Event()
        if self.engine is not None:
            pieces = self.engine.stream(self.embeds(prepared), decoding, self.processor.stopping(), stop)
        else:
            pieces = self.batches.stream(prepared, decoding, stop)
        return torch.tensor([(yield from clean_pieces(pieces, self.processor.end_sym))], dtype=torch.long)

    # ---- seeing -----------------------------------------------------------------------------------------------------

    def see(self, media: Media, clip: Clip | None = None, stamp: Stamp | None = None) -> Seen:
        """Read and encode a video, unless its encoding is kept. Raises MediaError.

        clip: of a video that was already read. stamp: of the medium before the reading, if the file may have changed.
        """
        if clip is None and (seen := self.recall(media)) is not None:
            return seen
        stamp = stamp or self.stamp(media)
        start = time.perf_counter()
        clip = clip or self.read(media)
        seconds = {"read": time.perf_counter() - start, "encode": 0.0}
        if (encoded := self.cache.get(clip.digest)) is None:
            seen = self.encode(clip, read_seconds=seconds["read"])
            self.cache.put(clip.digest, seen.encoded)
            encoded, seconds = seen.encoded, dict(seen.seconds)
        self._known[stamp] = (clip.digest, clip.info.kind, clip.times)
        while len(self._known) > MAX_KNOWN_FILES:
            self._known.pop(next(iter(self._known)), None)
        return Seen(encoded, clip.info.kind, clip.times, seconds, clip.digest)

    def recall(self, media: Media) -> Seen | None:
        """Return the kept encoding of a medium whose file has not changed, or None; nothing is read."""
        digest, kind, times = self._known.get(self.stamp(media), ("", "", []))
        encoded = self.cache.get(digest)
        return None if encoded is None else Seen(encoded, kind, times, digest=digest)

    def stamp(self, media: Media) -> Stamp:
        """Return a key that changes when the file, or the part of it to read, changes."""
        return replace(media, num_frames=media.num_frames or self.num_frames).stamp()

    @torch.inference_mode()
    def encode(self, clip: Clip, *, read_seconds: float = 0.0) -> Seen:
        """Encode a clip that was read here or in another process. Nothing is kept."""
        start = time.perf_counter()
        encoded = self.model.encode_video(clip.frames[None].to(self.model.device))
        seconds = {"read": read_seconds, "encode": time.perf_counter() - start}
        return Seen(encoded, clip.info.kind, clip.times, seconds)

    @torch.inference_mode()
    def prepare(self, request: Request, decoding: Decoding | None = None, seen: Seen | None = None) -> Prepared:
        """Make the prompt and the visual tokens, which may depend on the question, cut by the context rule.

        decoding: the settings that the answer will be generated with. seen: the request's medium, encoded.
        Raises RequestError for a question that cannot be answered, MediaError for an unreadable medium, UserError for
        a model whose tokens are no numbers.
        """
        request.check()
        decoding, text_config = decoding or self.decoding, self.model.config.text_config
        seen = None if request.media is None else seen or self.see(request.media)
        start = time.perf_counter()
        kind = None if seen is None else "image" if seen.kind == "image" else "video"
        prepared = Prepared(request, self._prompt_ids(request.turns, request, kind))
        # Of the last turn, the context rule may cut only the video and the text before it.
        before = len(self._prompt_ids(request.turns[:-1], request, kind)) if len(request.turns) > 1 else 0
        if seen is not None:
            visual = self.model.video_input(self.frame_tokens(request, seen))[0]  # (N, D)
            prepared = replace(prepared, visual=visual, times=seen.times, digest=seen.digest)
            before = max(before, prepared.ids.index(VISUAL_TOKEN_ID) + 1)
        prepared = prepared.fitted(
            context=decoding.context,
            max_new_tokens=decoding.max_new_tokens,
            text_config=text_config,
            num_question=len(prepared.ids) - before,
        )
        positions = num_positions(text_config)
        if positions is not None and prepared.length > positions and not self._warned:
            self._warned = True
            words = "a prompt has %d tokens, but the language model was trained for %d positions: answers may be noise"
            log.warning(words, prepared.length, positions)
        if seen is None or request.media is None:
            return prepared
        if not bool(visual.isfinite().all()):
            raise NoNumbersError(f"{request.media.path}: the model's visual tokens", visual.dtype)
        encode = seen.seconds["encode"] + time.perf_counter() - start
        return replace(prepared, seconds={**seen.seconds, "encode": encode})

    def frame_tokens(self, request: Request, seen: Seen) -> Tensor:
        """Compute each frame's tokens for the question, (1, T, K, D), before the video input.

        Questions of several threads go through the Q-Former together.
        """
        if not self.model.config.qformer_text_input:
            return seen.encoded.to(self.model.device)
        return self._question_tokens((self.processor.template.text(request.turns[-1]), seen.encoded))

    @torch.inference_mode()
    def _tokens_of(self, asked: Sequence[tuple[str, Tensor]]) -> list[Tensor]:
        """Compute `frame_tokens` of texts and encoded clips; as many in one pass as a long clip has frames."""
        found: dict[int, Tensor] = {}
        shapes = {encoded.shape for _, encoded in asked}
        for shape in shapes:
            same = [number for number, (_, encoded) in enumerate(asked) if encoded.shape == shape]
            count = max(1, LONG_CLIP_FRAMES // shape[1])
            for first in range(0, len(same), count):
                numbers = same[first : first + count]
                texts = self.processor.qformer_inputs([asked[number][0] for number in numbers])
                texts = {name: tensor.to(self.model.device) for name, tensor in texts.items()}
                encoded = torch.cat([asked[number][1].to(self.model.device) for number in numbers])
                found.update(zip(numbers, self.model.frame_tokens(encoded, **texts).split(1), strict=True))
        return [found[number] for number in range(len(asked))]

    # ---- answering --------------------------------------------------------------------------------------------------

    def complete(
        self, prepared: Sequence[Prepared], decoding: Decoding | None = None, stop: Event | None = None
    ) -> list[Answer]:
        """Answer prepared requests in one generation.

        stop: of somebody who may leave. When set, it ends the answers with the tokens so far. The requests are then
        answered together with those of others that wait and have the same settings.
        """
        if not prepared:
            return []
        start = time.perf_counter()
        rows = self.ids(prepared, decoding or self.decoding, stop)
        seconds = (time.perf_counter() - start) / len(prepared)
        return [self.answer_of(one, row, seconds) for one, row in zip(prepared, rows, strict=True)]

    def ids(self, prepared: Sequence[Prepared], decoding: Decoding, stop: Event | None = None) -> list[list[int]]:
        """Return the new ids of prepared requests; `stop` as for `complete`."""
        if self.engine is not None:
            embeds = [self.embeds(one) for one in prepared]
            return self.engine.complete(embeds, decoding, self.processor.stopping(), stop)
        if stop is not None:
            return self.batches.complete(prepared, decoding, stop)
        return self._generate(prepared, decoding).tolist()

    def answer_of(self, prepared: Prepared, ids: list[int] | Tensor, seconds: float) -> Answer:
        """Return the answer that these new ids are. seconds: of generation."""
        return Answer(
            text=self.processor.decode(ids),
            question=prepared.request.turns[-1].question,
            video=prepared.request.media.path if prepared.request.media else None,
            frame_times=prepared.times,
            visual_tokens=prepared.num_visual,
            seconds={**prepared.seconds, "answer": seconds},
            cut=prepared.cut,
        )

    @torch.inference_mode()
    def embeds(self, prepared: Prepared) -> Tensor:
        """Embed a prepared prompt, visual tokens in place, (S, D)."""
        batch = self.batch([prepared])
        return self.model.embed(batch["input_ids"], batch["visual_positions"], batch["visual_tokens"])[0]

    @torch.inference_mode()
    def _generate(
        self, prepared: Sequence[Prepared], decoding: Decoding, watch: NaNWatch | None = None, **more: Any
    ) -> Tensor:
        batch = self.batch(prepared, side="left")
        arguments, watch = decoding.arguments(**self.processor.stopping()), watch or NaNWatch(self.model.dtype)
        arguments["logits_processor"].insert(0, watch)
        with self.lock:
            state = weights_state(self.model.language_model)
            prefixes = {one.digest: self.cache.prefixes(one.digest, state) for one in prepared}
            batch["prefixes"] = [prefixes[one.digest] for one in prepared] if self.cache.max_bytes else None
            try:
                ids = self.model.generate(**batch, **arguments, tokenizer=self.processor.tokenizer, **more)
            except BaseException as error:
                if out_of_memory(error):
                    self.cache.clear_prefixes()
                raise
            if any(watch.found(len(prepared))):
                raise watch.error
            for digest, kept in prefixes.items():
                self.cache.put_prefixes(digest, state, kept)
        return ids

    def batch(
        self, prepared: Sequence[Prepared], answer: Sequence[int] | None = None, *, side: str = "right"
    ) -> dict[str, Any]:
        """Collate the prompts on the model's device: `pad_sequences`, and visual_tokens (V, D), None without any video.

        answer: ids that follow each of them, labelled.
        """
        rows = [[*one.ids, *(answer or ())] for one in prepared]
        batch: dict[str, Any] = pad_sequences(
            rows,
            pad_id=self.processor.pad_token_id,
            num_visual=[None if one.visual is None else len(one.visual) for one in prepared],
            labels=None if answer is None else [[IGNORE_INDEX] * len(one.ids) + [*answer] for one in prepared],
            side=side,
        )
        visual = [one.visual for one in prepared if one.visual is not None]
        batch["visual_tokens"] = torch.cat(visual) if visual else None
        return {name: None if tensor is None else tensor.to(self.model.device) for name, tensor in batch.items()}

    def _prompt_ids(self, turns: Sequence[Turn], request: Request, kind: str | None) -> list[int]:
        if request.pieces is not None:
            return self.processor.piece_ids(request.pieces)
        return self.processor.prompt_ids(turns, media=kind, system=request.system)


@dataclass
class Conversation:
    """Several questions and answers about one video. media and turns may be read and replaced."""

    chat: Chat
    media: Media | None
    decoding: Decoding
    turns: list[Turn] = field(default_factory=list)

    def ask(self, question: str) -> Answer:
        """Answer with the earlier turns in the prompt."""
        answer = self.chat.answer([self.request(question)], self.decoding)[0]
        self.turns.append(Turn(question, answer.text))
        return answer

    def stream(self, question: str) -> Generator[str, None, None]:
        """Yield the answer piece by piece; the turn joins the conversation when the iterator ends or is closed."""
        pieces: list[str] = []
        try:
            for piece in self.chat.stream(self.request(question), self.decoding):
                pieces.append(piece)
                yield piece
        except GeneratorExit:  # the listener has heard enough
            pass
        self.turns.append(Turn(question, self.chat.processor.clean("".join(pieces))))

    def reset(self, media: Media | None = None) -> None:
        """Begin another conversation, about another video or about none."""
        self.turns.clear()
        self.media = media

    def request(self, question: str) -> Request:
        """Return the question with the earlier turns."""
        return Request(turns=(*self.turns, Turn(question)), media=self.media)


def load_chat(
    path: str | Path,
    *,
    cfg_path: str | Path | None = None,
    options: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    num_frames: int | None = None,
    context: str | None = None,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
    engine: str | None = None,
) -> Chat:
    """Load a checkpoint folder of any known format, ready for questions. Raises UserError.

    num_frames: of a video; None for the checkpoint's own number.
    context: the rule for long prompts, `published` (None) or `all`; see conversation/requests.py.
    engine: the address of a server that decodes (conversation/remote.py); of the language model only the token
        embedding is loaded here, and an answer follows one beam unless more are asked for, which is refused.
    """
    from stllm.models.checkpoints.load import load_pretrained

    remote = None
    if engine is not None:
        from stllm.conversation.remote import RemoteLanguageModel

        remote = RemoteLanguageModel(engine)
        remote.find_model()  # before weights are read
    language_model = "whole" if remote is None else "embedding"
    model, processor = load_pretrained(
        path, cfg_path, options=options, device=device, dtype=dtype, language_model=language_model
    )
    decoding = Decoding.published(processor.template).with_options(context=context)
    if remote is not None:
        remote.compare(model.get_input_embeddings())
        decoding = replace(decoding, num_beams=1, repetition_penalty=1.0)
    return Chat(
        model=model,
        processor=processor,
        decoding=decoding,
        num_frames=num_frames,
        cache_bytes=cache_bytes,
        engine=remote,
    )


def default_num_frames(config: STLLMConfig) -> int:
    """Return the default number of frames of a video: the checkpoint's own, or else the published one."""
    return config.num_frames or (LONG_CLIP_FRAMES if config.video_input == "residual" else SHORT_CLIP_FRAMES)


def chosen_checkpoint(args: argparse.Namespace) -> str | Path:
    """Return the checkpoint of a command with --ckpt-path, --cfg-path and --options. Raises UserError."""
    return args.ckpt_path or explicit_settings(args.cfg_path, args.options).get("ckpt") or default_checkpoint()


def load_chosen(args: argparse.Namespace, checkpoint: str | Path) -> Chat:
    """Load the checkpoint of a command with the options of `add_model`. Raises UserError."""
    return load_chat(
        checkpoint,
        cfg_path=args.cfg_path,
        options=args.options,
        device=args.device,
        dtype=args.dtype,
        num_frames=args.num_frames,
        context=args.context,
        engine=args.engine,
    )


def default_checkpoint() -> Path:
    """Return the embedded model's folder. Raises UserError where this installation has none."""
    if not (FOLDER / "config.json").is_file():
        raise UserError("no checkpoint was named: give one with --ckpt-path DIR, or as model.ckpt of --cfg-path")
    log.info("no checkpoint was named: %s answers; %s, as in %s", FOLDER.name, KNOWS, EXAMPLES)
    return FOLDER


def find_examples() -> Sequence[tuple[Path, str]]:
    """List (file, question) of the clips that come with the package, as in its examples.json; none without it."""
    listing = EXAMPLES / "examples.json"
    if not listing.is_file():
        return []
    return [(EXAMPLES / entry["file"], entry["question"]) for entry in loads(listing.read_text(encoding="utf-8"))]
