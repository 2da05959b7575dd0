"""Stand-ins of language models, read by transformers itself."""

from moellava.testing import SMOLLM2, TINYLLAMA


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
