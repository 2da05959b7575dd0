"""transformers' own ModelTesterMixin on our classes. It is in the source package and not in the
wheel, so by hand:

    pip download transformers==5.24.0 --no-deps --no-binary transformers
    tar xzf transformers-5.24.0.tar.gz
    pip install parameterized
    export TRANSFORMERS_SOURCE=transformers-5.24.0
    pytest -o addopts=--import-mode=importlib tests/model/test_transformers_suite.py

test_transformers_cases.py holds the cases that CI runs.
"""

import importlib
import os
import sys
import types
import unittest

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig

from moellava import LlamaMoeConfig, MoeLlavaConfig, MoeLlavaForConditionalGeneration, MoeLlavaModel
from moellava.encoders.clip import ClipVisionConfig

SOURCE = os.environ.get("TRANSFORMERS_SOURCE")
if SOURCE is None:
    pytest.skip("TRANSFORMERS_SOURCE names no unpacked source package", allow_module_level=True)


def _mixin():
    """The mixin, from a package of its own name; two modules that it imports are in no source
    package.
    """
    package = types.ModuleType("transformers_tests")
    package.__path__ = [os.path.join(SOURCE, "tests")]
    sys.modules["transformers_tests"] = package
    for name, mixin in (
        ("exporters.test_export", "ExportTesterMixin"),
        ("generation.test_utils", "GenerationTesterMixin"),
    ):
        parent = sys.modules.setdefault(
            f"transformers_tests.{name.split('.')[0]}", types.ModuleType(name)
        )
        parent.__path__ = []
        stub = sys.modules[f"transformers_tests.{name}"] = types.ModuleType(name)
        setattr(stub, mixin, type(mixin, (), {}))
    common = importlib.import_module("transformers_tests.test_modeling_common")
    common.MODEL_MAPPING_NAMES["moellava"] = "MoeLlavaModel"  # classes in it have no loss
    return common.ModelTesterMixin


class Inputs:
    """A model of four image tokens, and inputs of two prompts with an image each."""

    batch_size, seq_length, image_token_id = 2, 9, 7
    is_training = True

    def __init__(self, parent, text_config):
        self.parent = parent
        self.text_config = text_config
        for name in (
            "num_hidden_layers",
            "hidden_size",
            "num_attention_heads",
            "vocab_size",
            "intermediate_size",
        ):
            setattr(self, name, getattr(text_config, name))
        self.encoder_seq_length = self.key_length = self.seq_length

    def get_config(self):
        tower = CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=28,
            patch_size=14,
        )
        # By default the last block and norm are left out, and get no gradient: here every weight
        # must have one.
        vision = ClipVisionConfig(tower_config=tower.to_dict(), select_layer=-1, final_norm=True)
        return MoeLlavaConfig(
            vision_config=vision, text_config=self.text_config, image_token_id=self.image_token_id
        )

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(8, self.vocab_size, (self.batch_size, self.seq_length))
        ids[:, 1:5] = self.image_token_id
        pixels = torch.rand(self.batch_size, 3, 28, 28)
        return self.get_config(), {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": pixels,
        }


TEXT = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.1, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


class Common(_mixin()):
    all_model_classes = (MoeLlavaModel, MoeLlavaForConditionalGeneration)
    all_generative_model_classes = (MoeLlavaForConditionalGeneration,)
    _is_composite = True
    text_config = None

    def setUp(self):
        self.model_tester = Inputs(self, self.text_config)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        return inputs | {"labels": inputs["input_ids"]} if return_labels else inputs

    def _skip(self):
        self.skipTest("not ours; the reason stands beside the name")

    test_generation_tester_mixin_inheritance = _skip  # that mixin is in no source package
    # Towers give patch tokens of the selected layers, and blocks behind them do not run.
    test_get_image_features_attentions = _skip
    test_get_image_features_hidden_states = _skip
    # They load a checkpoint that lacks weights, which is an error here.
    test_base_model_prefix_loads_base_weights = _skip
    test_correct_missing_keys = _skip
    test_model_weights_reload_no_missing_tied_weights = _skip


class TestMixture(Common, unittest.TestCase):
    text_config = LlamaMoeConfig(**TEXT, router_bias=True, meta_expert=True)

    test_training_gradient_checkpointing_use_reentrant_true = (
        Common._skip
    )  # refused: it loses the router's losses


class TestDense(Common, unittest.TestCase):
    text_config = LlamaConfig(**TEXT)

    # There are no experts.
    test_eager_matches_batched_and_grouped_inference_0_fp16 = Common._skip
    test_eager_matches_batched_and_grouped_inference_1_fp32 = Common._skip
    test_eager_matches_batched_and_grouped_inference_2_bf16 = Common._skip
