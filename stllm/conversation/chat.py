"""A loaded model that answers questions about videos and images, for chat, demos and benchmarks.

Steps: read -> encode -> prepare (prompt and visual tokens) -> complete; `Chat.answer` runs all of them.
A video is read and encoded once. The encoder's output is cached under a hash of the frames, so a further question only
runs the parts that depend on it. Letters in shapes: S prompt tokens, N visual tokens of a prompt, V those of a batch, T
frames, K tokens of a frame, D width of the language model, A new tokens.
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
    EncodedClip,
    FeatureCache,
    Media,
    Prepared,
    Request,
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
FOLDER = Path(__file__).parents[1] / "assets" / "stllm-tiny"  # the model in the package, the default checkpoint
EXAMPLES = FOLDER.with_name("examples")  # clips about which it answers correctly
KNOWS = "it knows only the toy world: a few coloured shapes that move, blink and change, in short clips"
SHORT_CLIP_FRAMES, LONG_CLIP_FRAMES = 16, 64  # published: 64 frames go with the global-local module, 16 without


class Chat:
    """A loaded model that answers questions.

    decoding: default settings of generation; None for the published ones of the model's family.
    num_frames: default number of frames per video; None for the checkpoint's.
    cache_bytes: size limit of the cache. It holds encoded videos in main memory, and the language model's keys and
        values of prompts about them on its device. 0: nothing is cached.
    engine: a server that runs the language model; `model` then needs only the language model's token embedding.
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
        self.lock = Lock()  # held during a generation
        self._question_tokens: Together[tuple[str, Tensor], Tensor] = Together(self._tokens_of)
        self._warned = False  # True once the user was warned of a prompt longer than the model's positions

    @cached_property
    def batches(self) -> "Batches":
        """The queue of questions for the language model."""
        from stllm.conversation.streaming import Batches

        return Batches(self._generate, self.processor, self.model.dtype)

    # ---- asking -----------------------------------------------------------------------------------------------------

    def ask(self, path: str | Path | None, question: str, **options: Any) -> Answer:
        """Answer one question. path: video, gif, frame folder or image; None for a question without media.

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
        """Measure how much each part of a video mattered to an answer (None: the model's own answer).

        Options as for `ask`.
        """
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
        """Yield the answer to a prepared request piece by piece. Returns the new token ids, (1, A).

        Waiting requests with the same settings are answered in one batch. Setting `stop` ends the generation.
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

    def see(self, media: Media, clip: Clip | None = None, stamp: Stamp | None = None) -> EncodedClip:
        """Return the encoding of a video from the cache, or read and encode it. Raises MediaError.

        clip: the clip, if the video was already read. stamp: the medium's stamp from before that reading, in case the
        file has changed since.
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
        return EncodedClip(encoded, clip.info.kind, clip.times, seconds, clip.digest)

    def recall(self, media: Media) -> EncodedClip | None:
        """Return the cached encoding of a medium if its file has not changed, else None. The file is not read."""
        digest, kind, times = self._known.get(self.stamp(media), ("", "", []))
        encoded = self.cache.get(digest)
        return None if encoded is None else EncodedClip(encoded, kind, times, digest=digest)

    def stamp(self, media: Media) -> Stamp:
        """Return a key that differs when the file has changed, or when another part of it is to be read."""
        return replace(media, num_frames=media.num_frames or self.num_frames).stamp()

    @torch.inference_mode()
    def encode(self, clip: Clip, *, read_seconds: float = 0.0) -> EncodedClip:
        """Encode a clip without caching the result. read_seconds: the time that reading took."""
        start = time.perf_counter()
        encoded = self.model.encode_video(clip.frames[None].to(self.model.device))
        seconds = {"read": read_seconds, "encode": time.perf_counter() - start}
        return EncodedClip(encoded, clip.info.kind, clip.times, seconds)

    @torch.inference_mode()
    def prepare(self, request: Request, decoding: Decoding | None = None, seen: EncodedClip | None = None) -> Prepared:
        """Compute the prompt's token ids and visual tokens, shortened by the context rule if too long.

        decoding: the settings that the answer will be generated with. seen: the request's encoded medium, if any.
        Raises RequestError for a question that cannot be answered, MediaError for an unreadable medium, and UserError
        if the visual tokens are NaN or infinite.
        """
        request.check()
        decoding, text_config = decoding or self.decoding, self.model.config.text_config
        seen = None if request.media is None else seen or self.see(request.media)
        start = time.perf_counter()
        kind = None if seen is None else "image" if seen.kind == "image" else "video"
        prepared = Prepared(request, self._prompt_ids(request.turns, request, kind))
        # The context rule may not cut the last question: only tokens before it.
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

    def frame_tokens(self, request: Request, seen: EncodedClip) -> Tensor:
        """Compute the tokens of each frame, (1, T, K, D); they depend on the question if the Q-Former reads text.

        Concurrent calls from several threads go through the Q-Former in one batch.
        """
        if not self.model.config.qformer_text_input:
            return seen.encoded.to(self.model.device)
        return self._question_tokens((self.processor.template.text(request.turns[-1]), seen.encoded))

    @torch.inference_mode()
    def _tokens_of(self, asked: Sequence[tuple[str, Tensor]]) -> list[Tensor]:
        """Compute `frame_tokens` for pairs of a text and an encoded clip, in batches of at most 64 frames."""
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
        """Answer prepared requests in one batch.

        stop: an event that ends the answers early, with the tokens so far; with an engine or several beams, without
        any. If given, and without an engine, the requests also share a batch with waiting requests of other threads
        that have the same settings.
        """
        if not prepared:
            return []
        start = time.perf_counter()
        rows = self.ids(prepared, decoding or self.decoding, stop)
        seconds = (time.perf_counter() - start) / len(prepared)
        return [self.answer_of(one, row, seconds) for one, row in zip(prepared, rows, strict=True)]

    def ids(self, prepared: Sequence[Prepared], decoding: Decoding, stop: Event | None = None) -> list[list[int]]:
        """Generate the answers' token ids, one list per request; `stop` as for `complete`."""
        if self.engine is not None:
            embeds = [self.embeds(one) for one in prepared]
            return self.engine.complete(embeds, decoding, self.processor.stopping(), stop)
        if stop is not None:
            return self.batches.complete(prepared, decoding, stop)
        return self._generate(prepared, decoding).tolist()

    def answer_of(self, prepared: Prepared, ids: list[int] | Tensor, seconds: float) -> Answer:
        """Return the answer to a prepared request. ids: its new token ids. seconds: the time of its generation."""
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
        """Return the embeddings of a prepared prompt, text and visual tokens, (S, D)."""
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
        """Collate prompts on the model's device: the tensors of `pad_sequences` and visual_tokens, (V, D) or None.

        answer: token ids that are appended to each prompt and have labels. side: side to pad on.
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
    """Several questions and answers about one video. Callers may read and replace media and turns."""

    chat: Chat
    media: Media | None
    decoding: Decoding
    turns: list[Turn] = field(default_factory=list)

    def ask(self, question: str) -> Answer:
        """Answer a question; the prompt contains the earlier turns."""
        answer = self.chat.answer([self.request(question)], self.decoding)[0]
        self.turns.append(Turn(question, answer.text))
        return answer

    def stream(self, question: str) -> Generator[str, None, None]:
        """Yield the answer piece by piece. The turn joins the conversation when the iterator ends or is closed."""
        pieces: list[str] = []
        try:
            for piece in self.chat.stream(self.request(question), self.decoding):
                pieces.append(piece)
                yield piece
        except GeneratorExit:  # the caller closed the iterator before the end
            pass
        self.turns.append(Turn(question, self.chat.processor.clean("".join(pieces))))

    def reset(self, media: Media | None = None) -> None:
        """Forget the turns and start a conversation about another video, or without one."""
        self.turns.clear()
        self.media = media

    def request(self, question: str) -> Request:
        """Return the request for a question, with the earlier turns and the medium."""
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
    """Load a checkpoint folder of any known format. Raises UserError.

    num_frames: default number of frames per video; None for the checkpoint's.
    context: rule for long prompts, `published` (also None) or `all`; see conversation/requests.py.
    engine: URL of a server that runs the language model (conversation/remote.py). Of the language model, only the token
        embedding is loaded here. The default is then one beam, because an engine does not support several.
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
    """Return the default number of frames per video: the checkpoint's, or else the published number."""
    return config.num_frames or (LONG_CLIP_FRAMES if config.video_input == "residual" else SHORT_CLIP_FRAMES)


def chosen_checkpoint(args: argparse.Namespace) -> str | Path:
    """Return the checkpoint's path from --ckpt-path, --cfg-path or --options, or the default. Raises UserError."""
    return args.ckpt_path or explicit_settings(args.cfg_path, args.options).get("ckpt") or default_checkpoint()


def load_chosen(args: argparse.Namespace, checkpoint: str | Path) -> Chat:
    """Load a checkpoint with the command-line options that `add_model` defines. Raises UserError."""
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
    """Return the folder of the model in the package. Raises UserError if this installation has none."""
    if not (FOLDER / "config.json").is_file():
        raise UserError("no checkpoint was named: give one with --ckpt-path DIR, or as model.ckpt of --cfg-path")
    log.info("no checkpoint was named: %s answers; %s, as in %s", FOLDER.name, KNOWS, EXAMPLES)
    return FOLDER


def find_examples() -> Sequence[tuple[Path, str]]:
    """List (file, question) for the example clips in the package; empty if its examples.json is missing."""
    listing = EXAMPLES / "examples.json"
    if not listing.is_file():
        return []
    return [(EXAMPLES / entry["file"], entry["question"]) for entry in loads(listing.read_text(encoding="utf-8"))]
