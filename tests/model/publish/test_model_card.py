from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard

from moellava.model.builder_enhanced import load_pretrained_model
from moellava.model.publish.model_card import model_card
from moellava.testing import BIOMEDCLIP, TINYLLAMA


@pytest.fixture(scope="module")
def model(hub_cache):
    return load_pretrained_model(
        {"model_name_or_path": TINYLLAMA, "mm_vision_tower": BIOMEDCLIP}
    ).model


class TestCard:
    def test_it_names_tower_language_model_mixture_licence_and_data(self, model):
        text = str(
            model_card(
                model,
                "me/chest-xray",
                licence="mit",
                datasets=["flaviagiammarino/vqa-rad", "own images"],
            )
        )
        assert f"{BIOMEDCLIP}@0123456: 196 patch tokens of width 768" in text
        assert f"{TINYLLAMA}@0123456: `llama_moe`, 4 layers of width 64" in text
        assert "2 of 4 layers (0, 2): 4 experts of width 176, top-2" in text
        assert f"{model.num_parameters():,}" in text
        assert "`mit`." in text
        assert "- flaviagiammarino/vqa-rad\n- own images" in text
        assert 'load_pretrained_model("me/chest-xray")' in text

    def test_the_hubs_metadata_is_read_back_by_huggingface_hub(self, model):
        card = model_card(
            model,
            "me/chest-xray",
            licence="mit",
            datasets=["flaviagiammarino/vqa-rad", "own images"],
        )
        data = ModelCard(str(card)).data
        assert data.base_model == [TINYLLAMA, BIOMEDCLIP]
        assert (data.license, data.datasets) == ("mit", ["flaviagiammarino/vqa-rad"])
        assert (data.pipeline_tag, data.library_name) == ("image-text-to-text", "transformers")

    def test_what_is_not_known_is_said_and_not_invented(self, loaded):
        card = model_card(loaded.model, "chest-xray")
        assert "have not said what it was trained on" in str(card)
        assert "have not stated one" in str(card)
        assert card.data.license is None
        assert card.data.base_model == [TINYLLAMA]  # the tower was a folder: its name is no repo id
        assert "moellava-hub-" not in str(card)

    def test_a_dense_model_is_called_dense(self, parts):
        dense = load_pretrained_model(parts, moe_config=False).model
        assert "| mixture of experts | none, dense |" in str(model_card(dense, "x"))


class TestPush:
    @pytest.fixture
    def uploads(self, monkeypatch):
        """What would be uploaded: file names and the README, with the options of the commit."""
        seen = {}

        def upload_folder(self, *, folder_path, **options):
            readme = Path(folder_path, "README.md")
            seen.update(
                options,
                files={path.name for path in Path(folder_path).iterdir()},
                readme=readme.read_text() if readme.is_file() else None,
            )
            return "https://hub/commit/1"

        class Url:
            repo_id = "me/chest-xray"

        monkeypatch.setattr(HfApi, "create_repo", lambda self, *args, **kwargs: Url)
        monkeypatch.setattr(
            HfApi, "file_exists", lambda self, *args, **kwargs: seen.get("has_card", False)
        )
        monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
        return seen

    def test_the_models_own_push_to_hub_writes_the_card(self, loaded, uploads):
        url = loaded.model.push_to_hub(
            "chest-xray", processor=loaded.processor, licence="mit", private=True
        )
        assert url == "https://hub/commit/1"
        assert {
            "config.json",
            "model.safetensors",
            "processor_config.json",
            "tokenizer.json",
        } <= uploads["files"]
        assert uploads["readme"] == str(model_card(loaded.model, "me/chest-xray", licence="mit"))
        assert uploads["repo_id"] == "me/chest-xray"

    def test_the_code_goes_along_when_asked_for(self, loaded, uploads):
        loaded.model.push_to_hub("chest-xray", processor=loaded.processor, remote_code=True)
        assert "modeling_moellava_remote.py" in uploads["files"]
        with pytest.raises(OSError, match="save the model and the processor"):
            loaded.model.push_to_hub("chest-xray", remote_code=True)

    def test_a_card_that_somebody_wrote_stays(self, loaded, uploads):
        uploads["has_card"] = True
        loaded.model.push_to_hub("chest-xray")
        assert uploads["readme"] is None

    def test_an_unknown_option_is_an_error(self, loaded, uploads):
        with pytest.raises(TypeError, match="liscence"):
            loaded.model.push_to_hub("chest-xray", liscence="mit")
