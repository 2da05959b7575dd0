import pytest

from moellava.model.builder_enhanced import (
    load_pretrained_model,
)
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
