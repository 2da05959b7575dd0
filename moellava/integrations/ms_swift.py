"""moellava's models in ms-swift, as `--external_plugins` takes it.

    moellava integrations ms-swift > moellava_swift.py
    swift sft --external_plugins moellava_swift.py --model runs/2/model --dataset rows.jsonl ...

Prompts and labels are those of the chat template that was saved with the model.
"""

from typing import Any

from swift.model import Model, ModelGroup, ModelLoader, ModelMeta, MultiModelKeys
from swift.model.model_arch import register_model_arch
from swift.model.register import register_model
from swift.template import Template, TemplateMeta, register_template

from moellava.data.chat_labels import tokenize_chat
from moellava.data.collate import resolve_chat_template
from moellava.data.rows import IMAGE_TOKEN, Row, Turn
from moellava.model.modeling_moellava import MoeLlavaForConditionalGeneration

NAME = "moellava"


class MoeLlavaLoader(ModelLoader):  # type: ignore[misc]  # no types without the package
    """Loads a saved model by its own class."""

    def get_model(self, model_dir: str, *args: Any, **kwargs: Any) -> Any:
        self.auto_model_cls = MoeLlavaForConditionalGeneration
        return super().get_model(model_dir, *args, **kwargs)


class MoeLlavaTemplate(Template):  # type: ignore[misc]  # no types without the package
    """Encodes conversations as `moellava train` does, by the model's own chat template."""

    def _encode(self, inputs: Any) -> dict[str, Any]:
        system = [Turn("system", inputs.system)] if inputs.system else []
        turns = [Turn(one["role"], one["content"]) for one in inputs.messages if one["content"]]
        num_marks = sum(turn.text.count(IMAGE_TOKEN) for turn in turns)
        if num_marks != len(inputs.images):
            raise ValueError(f"{len(inputs.images)} images, but {num_marks} of {IMAGE_TOKEN}.")
        row = Row(id="", images=tuple(inputs.images), turns=(*system, *turns))
        processor = self.processor
        template = resolve_chat_template(processor, None)
        encoded: dict[str, Any] = {"labels": None, "loss_scale": None}
        if self.is_training:
            input_ids, is_answer = tokenize_chat(row.messages(), processor, template, None)
            encoded["labels"] = [
                token if answered else -100
                for token, answered in zip(input_ids, is_answer, strict=True)
            ]
        else:
            prompt = processor.apply_chat_template(
                row.messages(), chat_template=template, add_generation_prompt=True, tokenize=False
            )
            batch = processor(text=prompt, images=list(row.images) or None)
            [input_ids] = batch["input_ids"]
        if row.images:
            encoded["pixel_values"] = processor.pixel_values(list(row.images))
        return {**encoded, "input_ids": list(input_ids)}


register_model_arch(
    MultiModelKeys(
        NAME,
        language_model=["model.language_model", "lm_head"],
        aligner="model.multi_modal_projector",
        vision_tower="model.vision_tower",
    )
)
register_template(
    TemplateMeta(
        NAME,
        prefix=[],
        prompt=["{{QUERY}}"],  # `MoeLlavaTemplate` writes all of it
        chat_sep=[],
        suffix=[["eos_token_id"]],
        system_prefix=["{{SYSTEM}}"],
        template_cls=MoeLlavaTemplate,
    )
)
register_model(
    ModelMeta(
        NAME,
        [ModelGroup([Model(NAME, NAME)])],
        MoeLlavaLoader,
        template=NAME,
        architectures=["MoeLlavaForConditionalGeneration"],
        model_arch=NAME,
        is_multimodal=True,
        tags=["vision"],
    )
)
