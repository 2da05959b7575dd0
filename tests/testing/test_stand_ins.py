import socket

import pytest
import torch

from moellava.testing import BIOMEDCLIP, OPENAI_CLIP, SMOLLM2, TINYLLAMA, fill_hub_cache


def test_open_clip_itself_reads_the_biomedclip_stand_in(hub_cache, no_network):
    import open_clip

    model, _ = open_clip.create_model_from_pretrained(f"hf-hub:{BIOMEDCLIP}")
    stored = torch.load(hub_cache[BIOMEDCLIP] / "open_clip_pytorch_model.bin", weights_only=True)
    assert len([key for key in stored if key.startswith("visual.trunk.")]) == 150
    assert torch.equal(model.visual.trunk.pos_embed, stored["visual.trunk.pos_embed"])


def test_transformers_itself_reads_the_tinyllama_stand_in(hub_cache, no_network):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINYLLAMA)
    model = AutoModelForCausalLM.from_pretrained(TINYLLAMA)
    assert len(tokenizer) == model.config.vocab_size == 32000
    assert (tokenizer.pad_token_id, model.generation_config.pad_token_id) == (
        2,
        0,
    )  # they disagree in the original
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|user|>\nHi</s>\n<|assistant|>\n"
    assert (
        tokenizer.decode(tokenizer("Is this a CT image?\né").input_ids[1:])
        == "Is this a CT image?\né"
    )


def test_transformers_itself_reads_the_smollm2_stand_in(hub_cache, no_network):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    model = AutoModelForCausalLM.from_pretrained(SMOLLM2)
    assert len(tokenizer) == model.config.vocab_size == 49152
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert tokenizer("<|im_end|>").input_ids == [2]
    assert (
        tokenizer.decode(tokenizer("Is this a CT image?\né").input_ids) == "Is this a CT image?\né"
    )


def test_transformers_itself_reads_the_clip_stand_in(hub_cache, no_network):
    from transformers import AutoImageProcessor, CLIPVisionModel

    assert CLIPVisionModel.from_pretrained(OPENAI_CLIP).config.hidden_size == 64
    assert AutoImageProcessor.from_pretrained(OPENAI_CLIP).crop_size["height"] == 224


def test_blocked_network_refuses_a_connection(no_network):
    with pytest.raises(RuntimeError, match="network was used"):
        socket.create_connection(("localhost", 9))


def test_options_for_several_repos_are_refused(tmp_path):
    with pytest.raises(ValueError, match="2 repo ids"):
        fill_hub_cache(tmp_path, [BIOMEDCLIP, TINYLLAMA], seed=1)
