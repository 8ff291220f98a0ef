"""Prompts from the user as token ids, with their pictures."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pipeline.data.notes import Note, Tally, sentences
from pipeline.data.sources.pictures import PictureReader, is_data_url
from pipeline.data.tokenize import opening_ids
from pipeline.data.transforms.base import Context, Rendered, RowError
from pipeline.data.transforms.marks import MARK, without_marks
from pipeline.data.transforms.messages import MessageReader
from pipeline.data.transforms.pictures import RowPictures, take_pictures
from pipeline.data.transforms.rendering import ChatRenderer
from pipeline.data.transforms.template import find_placeholder
from pipeline.errors import UserError
from pipeline.evaluation.prompts import GivenPrompt
from pipeline.reference.actor import silence_libraries
from pipeline.secrets import redact_text
from strategies import vision
from strategies.media import MEDIA, OF_PARTS, is_given, media_in
from strategies.models.processor import chat_template_of, processor_or_reason
from strategies.models.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

    from strategies.config import StrategyConfig

__all__ = ["EncodedPrompt", "PromptEncoder", "check_lengths"]

SHOWN = 60
"""Characters of a picture's name."""
READER = MessageReader.from_keys({})
NO_TEMPLATE = "chat_template: the tokenizer has none to render messages with; set one (--set chat_template=chatml)"


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the model takes it."""

    ids: list[int]
    shown: str
    """The text that the user sees: the last message, with the number of those before it."""
    location: str
    images: tuple[bytes | Image, ...] = ()
    """Its pictures in the order of their placeholders, encoded or opened."""


class PromptEncoder:
    """Encodes prompts for a model.

    Args:
        tokenizer: the model's.
        processor: the model's, if it takes pictures.
        why_text_alone: why there is no processor.
        raw: continue text as it is; by default it becomes a user message if there is a chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        processor: ProcessorMixin | None = None,
        why_text_alone: str = "",
        raw: bool = False,
    ) -> None:
        self.tokenizer, self._why_text_alone, self._raw = tokenizer, why_text_alone, raw
        self.vision = None if processor is None else vision.VisionProcessing(processor)
        self._pictures = None if processor is None else _PicturePrompts(processor, tokenizer)
        self._tally = Tally()

    @classmethod
    def of(cls, cfg: StrategyConfig, raw: bool = False) -> PromptEncoder:
        """Load tokenizer and processor of `cfg.base_model`. Raises UserError."""
        silence_libraries()
        try:
            tokenizer = load_tokenizer(cfg)
            processor, reason = processor_or_reason(cfg, tokenizer)
        except ValueError as error:
            raise UserError(str(error)) from error
        default = f"base_model: {cfg.base_model!r} takes no pictures; give a vision-language model"
        return cls(tokenizer, processor, reason or default, raw)

    def encode(self, prompts: Sequence[GivenPrompt]) -> list[EncodedPrompt]:
        """Encode prompts, and read their pictures.

        Raises:
            UserError: for the first prompt that its model or chat template can't take, or whose pictures can't be read, with
                its location.
        """
        return [self._encode(given, number) for number, given in enumerate(prompts, start=1)]

    @property
    def notes(self) -> list[str]:
        """Sentences about the prompts so far: what may not be as their user meant it."""
        return sentences(self._tally.entries())

    def _encode(self, given: GivenPrompt, number: int) -> EncodedPrompt:
        from jinja2 import TemplateError

        notes = [Note("picture_unread", name, shown) for name, shown in given.unread.items()]
        try:
            if self._pictures is None:
                encoded = self._encode_text(given)
            else:
                encoded, found = self._pictures.encode(given, self._raw)
                notes += found
        except TemplateError as error:
            raise UserError(f"{given.location}: the chat template doesn't render it: {error}") from error
        # Also of a processor that doesn't take a picture's shape.
        except (ValueError, ArithmeticError) as error:
            raise UserError(f"{given.location}: {without_marks(str(error))}") from error
        self._tally.add("prompts", number, notes)
        return encoded

    def _encode_text(self, given: GivenPrompt) -> EncodedPrompt:
        if any(map(is_given, given.pictures.values())) or any(_media_in(given.content)):
            raise ValueError(f"it has pictures or other media, and {self._why_text_alone}")
        if isinstance(given.content, str) and (self._raw or self.tokenizer.chat_template is None):
            # With special tokens: plain text gets the tokenizer's BOS, which a chat template writes itself.
            return EncodedPrompt(self.tokenizer(given.content)["input_ids"], given.content, given.location)
        messages = _messages(given.content)
        if self.tokenizer.chat_template is None:
            raise ValueError(NO_TEMPLATE)
        ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
        return EncodedPrompt(ids["input_ids"], _shown(messages), given.location)


class _PicturePrompts:
    """Encodes prompts of a vision-language model, rendered as prepared rows are."""

    def __init__(self, processor: ProcessorMixin, tokenizer: PreTrainedTokenizerBase) -> None:
        context = Context(tokenizer, chat_template_of(processor))
        self._placeholder = find_placeholder(context, processor.image_token)
        has_template = bool(context.template or tokenizer.chat_template)
        context = replace(context, placeholder=self._placeholder)
        self._renderer = ChatRenderer.of(context, strip_end=False) if has_template else None
        self._vision, self._tokenizer = vision.VisionProcessing(processor), tokenizer
        self._readers: dict[str, PictureReader] = {}

    def encode(self, given: GivenPrompt, raw: bool) -> tuple[EncodedPrompt, list[Note]]:
        """Raises ValueError; RowError where its text and its pictures don't match, or a picture can't be read."""
        is_plain = isinstance(given.content, str) and (raw or self._renderer is None)
        content = given.content if is_plain else _with_role(given.content)
        row, pictures = take_pictures({"prompt": content, **given.pictures}, READER, self._placeholder)
        rendered, shown = self._rendered(row["prompt"], is_plain)
        placed = pictures.placed(rendered)
        images = [self._read(value, given.folder) for value in placed.pictures]
        ids = self._ids(placed, [opened for _, opened in images])
        # Text alone gives no place, so that before it is the usual one; a place in messages may be meant to be another.
        notes = [note for note in placed.notes if note.kind != "picture_placed" or isinstance(given.content, list)]
        kept = tuple(value for value, _ in images)
        return EncodedPrompt(ids, _with_names(shown, pictures), given.location, kept), notes

    def _rendered(self, content: Any, is_plain: bool) -> tuple[Rendered, str]:
        """Return text with marks of pictures, and what of it is shown."""
        if is_plain:
            return Rendered(content, (), templated=False, reward_columns={}), content
        if media := [*_media_in(content)]:
            raise RowError(f"it has {media[0]!r} in a message, where only text and pictures can be")
        if self._renderer is None:
            raise RowError(NO_TEMPLATE)
        messages = READER.messages(content, "prompt")
        prompt = self._renderer.render_prompt(messages)
        return Rendered(prompt.text, (), templated=True, reward_columns={}, notes=prompt.notes), _shown(messages)

    def _read(self, value: Any, folder: str) -> tuple[bytes | Image, Image]:
        """Return a picture as the model's batches take it, and opened. Raises ValueError."""
        from PIL import Image

        reader = self._readers.setdefault(folder, PictureReader(os.path.abspath(folder)))
        data = value if isinstance(value, Image.Image) else reader.read(value)
        try:
            return data, vision.decode_picture(data)
        except ValueError as error:
            raise RowError(f"{error} ({_name(value)})") from error

    def _ids(self, placed: Rendered, images: Sequence[Image]) -> list[int]:
        beside = self._tokenizer(placed.prompt.replace(self._placeholder.token, ""), add_special_tokens=False)["input_ids"]
        if {*self._vision.picture_ids()} & {*beside}:
            raise RowError("its text holds tokens that stand for parts of pictures")
        ids = self._vision.prompt_ids(placed.prompt, images)
        opening = opening_ids(self._tokenizer).tolist()
        is_opened = placed.templated or ids[: len(opening)] == opening
        return ids if is_opened else [*opening, *ids]


def _with_role(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}] if isinstance(content, str) else content


def _messages(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages whose content is text; others stay as they were given, whatever else they have."""
    return [
        message if isinstance(message["content"], str) else READER.message(message, "a message")
        for message in _with_role(content)
    ]


def _media_in(content: str | list[dict[str, Any]]) -> Iterator[str]:
    """Yield what is no text in messages, by its key or the type of its part."""
    for message in content if isinstance(content, list) else ():
        yield from media_in(message)
        for part in message["content"] if isinstance(message["content"], list) else ():
            if isinstance(part, dict):
                yield from [part["type"]] if part.get("type") in (*MEDIA, *OF_PARTS) else media_in(part)


def _shown(messages: Sequence[dict[str, Any]]) -> str:
    before = f"({len(messages) - 1} before) " if len(messages) > 1 else ""
    return f"{before}{messages[-1]['content']}"


def _with_names(text: str, pictures: RowPictures) -> str:
    return MARK.sub(lambda found: f"[{_name(pictures.values[int(found[1])])}]", text)


def _name(value: Any) -> str:
    """Return a picture's path or URI for readers; `picture` where it has none."""
    given = value.get("path") if isinstance(value, dict) else value
    path = os.fspath(given) if isinstance(given, os.PathLike) else given
    if not isinstance(path, str) or is_data_url(path):
        return "picture"
    return redact_text(path if len(path) <= SHOWN else f"...{path[-SHOWN:]}")


def check_lengths(prompts: Sequence[EncodedPrompt], new_tokens: int, positions: int) -> None:
    """Check that prompts with their answers fit the learned positions of a model.

    Raises:
        UserError: for the first one that doesn't.
    """
    for prompt in prompts:
        if len(prompt.ids) + new_tokens > positions:
            raise UserError(
                f"{prompt.location}: {len(prompt.ids)} tokens and an answer of {new_tokens} are more than the {positions} "
                "positions of the model; shorten it, or allow fewer new tokens"
            )
