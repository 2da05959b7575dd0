"""The model of `lmms_eval --model moellava`: `MoellavaChat`, over the same path as `evaluate`."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from PIL import Image

from moellava.data.rows import IMAGE_TOKEN, Role, Turn
from moellava.eval.asking import Answered, Asked, Asker
from moellava.eval.questions import image_name
from moellava.model.builder_enhanced import load_pretrained_model

_DEFAULT_NEW_TOKENS = 1024  # as lmms-eval's own models have it, if a task says nothing
# What a task may say of decoding: greedy, whatever its words.
_GREEDY = {"do_sample": (False,), "temperature": (0, None), "num_beams": (1, None)}


class _Item(TypedDict, total=False):
    type: str
    text: str
    url: Image.Image


class _Message(TypedDict):
    role: Role
    content: Sequence[_Item]


class MoellavaChat(lmms):  # type: ignore[misc]  # lmms_eval is optional and has no types
    """A saved checkpoint, asked greedily in batches; each image is encoded once.

    Args:
        pretrained: folder or hub id.
        batch_size, max_batch_size, device: as lmms-eval passes them; the last two may be None.
        dtype: such as float32; by default the checkpoint's own.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 8,
        max_batch_size: int | str | None = None,
        device: str | None = None,
        dtype: str | None = None,
    ) -> None:
        super().__init__()
        self.loaded = load_pretrained_model(pretrained, device=device, dtype=dtype)
        self.batch_size = int(batch_size)
        self.device = self.loaded.model.device

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """An answer to each request, in their order.

        Raises:
            ValueError: a task that asks for sampling or beams.
        """
        by_length: dict[int, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            by_length[_max_new_tokens(request.args[2])].append(number)
        answers: dict[int, Answered] = {}
        for max_new_tokens, numbers in by_length.items():
            answers |= self._ask([(number, requests[number]) for number in numbers], max_new_tokens)
        results = []
        for number, request in enumerate(requests):
            context, _, options = request.args[:3]
            text = _until(answers[number].text, options.get("until"))
            tokens = TokenCounts(output_tokens=answers[number].num_tokens)
            results.append(GenerationResult(text=text, token_counts=tokens))
            self.cache_hook.add_partial("generate_until", (context, options), text)
        return results

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("moellava answers generate_until tasks, not loglikelihood ones.")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise NotImplementedError("moellava answers generate_until tasks, not multi-round ones.")

    def _ask(
        self, numbered: Iterable[tuple[int, Instance]], max_new_tokens: int
    ) -> dict[int, Answered]:
        pictures: dict[str, tuple[Instance, int]] = {}  # name → where it is found again
        asked = []
        for number, request in numbered:
            turns, images = _conversation(self._messages(request))
            names = tuple(image_name(image) for image in images)
            for place, name in enumerate(names):
                pictures.setdefault(name, (request, place))
            asked.append(Asked(id=str(number), turns=turns, images=names))

        def load(name: str) -> Image.Image:
            request, place = pictures[name]
            return _conversation(self._messages(request))[1][place]

        asker = Asker(self.loaded, load, max_new_tokens=max_new_tokens, batch_size=self.batch_size)
        asker.check(asked)
        return {int(one.id): one for batch in asker.ask(asked) for one in batch}

    def _messages(self, request: Instance) -> Sequence[_Message]:
        _, doc_to_messages, _, doc_id, task, split = request.args
        messages: Sequence[_Message] = doc_to_messages(self.task_dict[task][split][doc_id])
        return messages


def _conversation(
    messages: Sequence[_Message],
) -> tuple[tuple[Turn, ...], list[Image.Image]]:
    """lmms-eval's messages as turns with a mark for each image, and the images."""
    turns, images = [], []
    for message in messages:
        text = ""
        for item in message["content"]:
            if item["type"] == "image":
                images.append(item["url"])
                text += f"{IMAGE_TOKEN}\n"
            elif item["type"] == "text":
                text += item["text"]
            else:
                raise ValueError(f"A message has {item['type']}; moellava reads text and images.")
        turns.append(Turn(message["role"], text))
    return tuple(turns), images


def _max_new_tokens(options: Mapping[str, object]) -> int:
    for name, allowed in _GREEDY.items():
        if name in options and options[name] not in allowed:
            raise ValueError(
                f"The task asks for {name}={options[name]!r}; moellava answers greedily. "
                f"Add --gen_kwargs {name}={allowed[0]}."
            )
    return int(str(options.get("max_new_tokens", _DEFAULT_NEW_TOKENS)))


def _until(text: str, stops: str | Sequence[str] | None) -> str:
    """The answer up to the first of the task's stop texts."""
    for stop in [stops] if isinstance(stops, str) else stops or ():
        text = text.partition(stop)[0] if stop else text
    return text
