"""What vLLM finds in an installed moellava; tests/vllm/run serves models with vLLM itself."""

import subprocess
import sys
from importlib.metadata import entry_points

import pytest

import moellava.model
from moellava.model import MoeLlavaForConditionalGeneration
from moellava.model.language_model import LlamaMoeForCausalLM
from moellava.serving.vllm import register


@pytest.fixture
def transformers(monkeypatch):
    import transformers

    for model_class in (MoeLlavaForConditionalGeneration, LlamaMoeForCausalLM):
        monkeypatch.delattr(transformers, model_class.__name__, raising=False)
    yield transformers
    for model_class in (MoeLlavaForConditionalGeneration, LlamaMoeForCausalLM):
        transformers.__dict__.pop(model_class.__name__, None)


def test_the_entry_point_puts_the_classes_where_vllm_looks(transformers):
    (entry,) = [
        entry for entry in entry_points(group="vllm.general_plugins") if entry.name == "moellava"
    ]
    entry.load()()
    found = getattr(transformers, "MoeLlavaForConditionalGeneration")  # noqa: B009 - as vLLM does
    assert found is MoeLlavaForConditionalGeneration
    assert found.is_backend_compatible()
    assert transformers.LlamaMoeForCausalLM is LlamaMoeForCausalLM


def test_where_moellava_cannot_be_imported_vllm_goes_on(transformers, monkeypatch, caplog):
    monkeypatch.delattr(moellava.model, "MoeLlavaForConditionalGeneration")
    register()
    (record,) = caplog.records
    assert "MoeLlavaForConditionalGeneration" in record.getMessage()
    assert transformers.__version__ in record.getMessage()
    assert not hasattr(transformers, "LlamaMoeForCausalLM")


def test_the_plug_in_is_loaded_without_torch():
    code = (
        "import sys, moellava.serving.vllm; assert not {'torch', 'transformers'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
