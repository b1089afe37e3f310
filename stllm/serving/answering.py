"""The engine's part of a request: prepares it, and yields the answer piece by piece, then how it ended."""

from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from threading import Event

from torch import Tensor

from stllm.common.errors import UserError
from stllm.conversation.chat import Chat
from stllm.conversation.decoding import Decoding
from stllm.conversation.requests import Media, Request
from stllm.conversation.seeing import Prepared
from stllm.media.reading import NobodyWaits, ReadingPool
from stllm.serving.errors import ApiError
from stllm.serving.jobs import Stage
from stllm.serving.limits import Limits
from stllm.serving.replies import Finished
from stllm.serving.requests import Asked


def answer_steps(
    chat: Chat, reading: ReadingPool, limits: Limits, asked: Asked, path: Path | None, stop: Event
) -> Generator[str | Finished | Stage, None, None]:
    """Pieces of text, and `Finished` last. path: of the request's medium. Raises ApiError for what cannot be read."""
    media = None if path is None else Media(str(path), num_frames=asked.num_frames)
    request = Request(asked.turns, media, asked.system)
    with hiding(path):
        request.check()
        seen = None
        if media is None or (seen := chat.recall(media)) is not None:
            yield Stage.MODEL
        else:
            stamp = chat.stamp(media)
            yield Stage.READING
            clip = reading.read(partial(limits.read, chat.read, media), Path(media.path), stop)
            yield Stage.MODEL
            seen = chat.see(media, clip, stamp)
            del clip
        prepared = chat.prepare(request, asked.decoding, seen)
        with closing(chat.stream_prepared(prepared, asked.decoding, stop)) as pieces:
            ids = yield from pieces
    yield _end(chat, asked.decoding, prepared, ids)


def _end(chat: Chat, decoding: Decoding, prepared: Prepared, ids: Tensor) -> Finished:
    """ids: (1, A), what was generated."""
    text = str(chat.processor.tokenizer.decode(ids[0], skip_special_tokens=True))
    ended = int(ids[0, -1]) == chat.processor.eos_token_id or chat.processor.end_sym in text
    cut = ids.shape[1] >= decoding.max_new_tokens and not ended
    reason = "length" if cut else "stop"
    return Finished(chat.processor.clean(text), reason, prepared.length, ids.shape[1], prepared.cut.total)


@contextmanager
def hiding(path: Path | None) -> Iterator[None]:
    """Messages within speak of the medium, not of where it lies on this machine."""
    try:
        yield
    except NobodyWaits:
        raise
    except UserError as error:
        text = " ".join(str(error).split())
        raise ApiError(400, text if path is None else text.replace(str(path), "the video or image")) from None
