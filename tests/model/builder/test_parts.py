import pytest

from moellava.model.builder_enhanced import (
    load_pretrained_model,
    load_tokenizer,
)


class TestBadInput:
    def test_a_wrong_mm_hidden_size_names_both_widths(self, parts):
        with pytest.raises(
            ValueError, match=r"mm_hidden_size is 512, but .* width 192\. Set mm_hidden_size=192"
        ):
            load_pretrained_model(parts | {"mm_hidden_size": 512})

    def test_load_tokenizer_names_the_place(self, tmp_path):
        with pytest.raises(OSError, match="No tokenizer can be read"):
            load_tokenizer(tmp_path)
