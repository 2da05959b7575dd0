import json
import shutil

import pytest

from moellava.model.builder_enhanced import (
    load_pretrained_model,
)
from moellava.model.checkpoint.difference import save_trainable
from moellava.testing import BIOMEDCLIP, TINYLLAMA

MISSION = {"model_name_or_path": TINYLLAMA, "mm_vision_tower": BIOMEDCLIP}


class TestBadInput:
    def test_a_missing_language_model_is_named_with_the_command_that_fetches_it(self, hub_cache):
        with pytest.raises(
            OSError, match=r"(?s)'nobody/no-llama' is found.*hf download nobody/no-llama"
        ):
            load_pretrained_model(MISSION | {"model_name_or_path": "nobody/no-llama"})

    def test_a_folder_that_is_no_checkpoint_says_what_it_holds(self, tmp_path):
        (tmp_path / "notes.txt").write_text("x")
        with pytest.raises(
            OSError, match=r"not a checkpoint: it has no config.json \(found: notes.txt\)"
        ):
            load_pretrained_model(tmp_path)

    def test_an_integer_dtype_is_refused(self, parts):
        with pytest.raises(ValueError, match=r"dtype is 'int8'; give torch\.float32"):
            load_pretrained_model(parts, dtype="int8")

    def test_a_broken_config_is_not_a_missing_model(self, tmp_path):
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(ValueError, match=r"config\.json .*cannot be read as JSON"):
            load_pretrained_model(tmp_path)
        (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
        with pytest.raises(
            OSError, match=r"(?s)config\.json of .* cannot be read.*nonsense"
        ) as info:
            load_pretrained_model(tmp_path)
        assert "hf download" not in str(info.value)

    @pytest.mark.parametrize(
        "model_type", ["llava_llama", "llava_mistral", "moe_llava_stablelm", "llava_phi", "llava"]
    )
    def test_the_original_codes_checkpoints_say_what_can_be_done(self, tmp_path, model_type):
        settings = {"model_type": model_type, "mm_vision_tower": "openai/clip", "hidden_size": 4096}
        (tmp_path / "config.json").write_text(json.dumps(settings))
        with pytest.raises(ValueError, match=rf"original code of LLaVA.*{model_type}.*projector"):
            load_pretrained_model(tmp_path)


class TestGenerationConfig:
    @pytest.fixture
    def language_model(self, hub_cache, tmp_path):
        return shutil.copytree(hub_cache[TINYLLAMA], tmp_path / "llama")

    def test_sampling_values_without_sampling_do_not_stop_a_save(
        self, parts, language_model, tmp_path
    ):
        path = language_model / "generation_config.json"
        settings = json.loads(path.read_text())
        settings.pop("do_sample", None)
        path.write_text(json.dumps(settings | {"temperature": 0.9, "top_p": 0.6}))
        loaded = load_pretrained_model(parts | {"model_name_or_path": str(language_model)})
        assert not loaded.model.generation_config.do_sample
        loaded.model.save_pretrained(tmp_path / "whole")
        save_trainable(loaded, tmp_path / "delta")

    def test_values_of_a_model_that_samples_stay(self, parts, language_model):
        path = language_model / "generation_config.json"
        path.write_text(json.dumps({"do_sample": True, "temperature": 0.9}))
        loaded = load_pretrained_model(parts | {"model_name_or_path": str(language_model)})
        assert loaded.model.generation_config.temperature == 0.9

    def test_a_broken_file_is_an_error_that_names_it(self, parts, language_model):
        (language_model / "generation_config.json").write_text("{")
        with pytest.raises(ValueError, match=r"generation_config\.json .*cannot be read as JSON"):
            load_pretrained_model(parts | {"model_name_or_path": str(language_model)})

    def test_a_missing_file_gives_the_tokenizers_tokens(self, parts, language_model):
        (language_model / "generation_config.json").unlink()
        loaded = load_pretrained_model(parts | {"model_name_or_path": str(language_model)})
        assert loaded.model.generation_config.eos_token_id == loaded.tokenizer.eos_token_id

    @pytest.mark.parametrize(
        "content", ["{", "[]", '{"eos_token_id": "x"}', '{"bos_token_id": -1}']
    )
    def test_a_broken_file_of_a_saved_model_is_an_error_that_names_it(self, whole, content):
        (whole / "generation_config.json").write_text(content)
        with pytest.raises(ValueError, match=r"generation_config\.json "):
            load_pretrained_model(whole)


@pytest.fixture
def whole(loaded, tmp_path):
    loaded.model.save_pretrained(tmp_path / "whole")
    loaded.processor.save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


class TestChatTemplate:
    @pytest.mark.parametrize("template", ["{{ nothing.at.all }}", "{% for %}", "{{ 1 +}}"])
    def test_one_that_cannot_be_rendered_is_found_when_the_model_is_opened(self, whole, template):
        (whole / "chat_template.jinja").write_text(template)
        with pytest.raises(ValueError, match=r"whole cannot be read as a processor: .*template"):
            load_pretrained_model(whole)

    def test_one_that_refuses_some_conversations_opens(self, whole):
        template = "{% if messages | length != 1 %}{{ raise_exception('one turn') }}{% endif %}yes"
        (whole / "chat_template.jinja").write_text(template)
        again = load_pretrained_model(whole)
        assert again.answer(None, "What?", max_new_tokens=1)
        with pytest.raises(ValueError, match="chat template refuses the messages: one turn"):
            again.answer(None, [[{"role": "user", "content": "a"}] * 2], max_new_tokens=1)
