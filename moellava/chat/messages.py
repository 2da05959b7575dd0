"""The body of a chat-completions request → a checked request: OpenAI's fields, images as data URIs.

| name | gives |
|---|---|
| `ChatRequest` | the fields that are understood; others are errors |
| `Limits` | what a request may cost |
| `read_turns` | its messages as turns, with images decoded within the limits |
"""

import base64
import binascii
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from moellava.model.processing_moellava import MoeLlavaProcessor
from moellava.model.turns import Turn, read_message

_GZIP = b"\x1f\x8b"
_DEFLATED_DICOM = b"1.2.840.10008.1.2.1.99"  # pydicom unpacks all of it at once


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What requests may cost; all are checked before the costly step."""

    body_bytes: int = 32 * 2**20
    body_seconds: float = 60.0  # to send a whole body
    unpacked_bytes: int = 512 * 2**20  # of one gzipped image
    pixels: int = 64_000_000  # of one image
    images: int = 16  # of one request
    new_tokens: int = 512  # of one answer
    waiting: int = 64  # requests, those being answered included
    batch: int = 8  # requests that are answered together


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ImageUrl(_Strict):
    url: str = Field(description="A data: URI in base64: PNG, JPEG, DICOM or NIfTI.")
    detail: Literal["auto", "low", "high"] = "auto"  # one size only: all mean the same


class TextItem(_Strict):
    type: Literal["text"]
    text: str


class ImageItem(_Strict):
    type: Literal["image_url"]
    image_url: ImageUrl
    window: str | tuple[float, float] | None = None
    frame: int | str | None = None
    plane: str | None = None


Item = Annotated[TextItem | ImageItem, Field(discriminator="type")]


class ChatMessage(_Strict):
    role: Literal["system", "user", "assistant"]
    content: str | list[Item]
    name: str | None = None


class StreamOptions(_Strict):
    include_usage: bool = False


class ChatRequest(_Strict):
    """`POST /v1/chat/completions`."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] = 1
    user: str | None = None

    @property
    def stop_strings(self) -> list[str]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in given if text]


def read_turns(
    processor: MoeLlavaProcessor, messages: Sequence[ChatMessage], limits: Limits
) -> list[Turn]:
    """The messages as the model takes them.

    Raises:
        ValueError: an image that is not a data URI, cannot be read, or is beyond a limit.
    """
    num_images = sum(
        isinstance(item, ImageItem) for message in messages for item in message.content
    )
    if num_images > limits.images:
        raise ValueError(f"The request has {num_images} images; the limit is {limits.images}.")
    return [
        read_message(
            processor, {"role": message.role, "content": _content(message.content, limits)}
        )
        for message in messages
    ]


def decode_data_uri(url: str, limits: Limits) -> bytes:
    """The bytes of a base64 data URI; gzipped ones are unpacked within the limit.

    Raises:
        ValueError: any other URL, broken base64, too many bytes.
    """
    if not url.startswith("data:"):
        raise ValueError(
            f"image_url is {url[:40]!r}; expected a data: URI. This server reads no files and "
            "fetches no addresses: send the image itself."
        )
    head, _, payload = url.partition(",")
    if not head.endswith(";base64"):
        raise ValueError("image_url is a data: URI without ;base64. Encode the image in base64.")
    try:
        data = base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"image_url is not valid base64: {error}") from error
    if data.startswith(_GZIP):
        data = _unzipped(data, limits.unpacked_bytes)
    if _DEFLATED_DICOM in data[:2048]:
        raise ValueError("The image is deflated DICOM. Send it in another transfer syntax.")
    return data


def _content(content: str | Sequence[Item], limits: Limits) -> str | list[dict[str, object]]:
    if isinstance(content, str):
        return content
    return [_item(item, limits) for item in content]


def _item(item: TextItem | ImageItem, limits: Limits) -> dict[str, object]:
    if isinstance(item, TextItem):
        return {"type": "text", "text": item.text}
    view = {"window": item.window, "frame": item.frame, "plane": item.plane}
    given = {name: value for name, value in view.items() if value is not None}
    image = decode_data_uri(item.image_url.url, limits)
    return {"type": "image", "image": image, "max_pixels": limits.pixels, **given}


def _unzipped(data: bytes, most: int) -> bytes:
    unpacker = zlib.decompressobj(wbits=31)
    try:
        unpacked = unpacker.decompress(data, most + 1)
    except zlib.error as error:
        raise ValueError(f"The image is not valid gzip: {error}") from error
    if len(unpacked) > most:
        raise ValueError(f"The image is more than {most:,} bytes when unpacked, the limit.")
    return unpacked
