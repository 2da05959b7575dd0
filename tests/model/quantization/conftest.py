import pytest
import torch

from moellava.model.language_model import LlamaMoeConfig, LlamaMoeForCausalLM
from moellava.model.quantization import MoellavaQuantizationConfig

CONFIGS = {
    "int8": MoellavaQuantizationConfig(bits=8),
    "int4": MoellavaQuantizationConfig(bits=4, group_size=64),
}


def small_config(**fields) -> LlamaMoeConfig:
    """Two of four layers are mixtures, with a meta expert; widths that every group divides."""
    sizes = {
        "vocab_size": 99,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.1,
        "meta_expert": True,
        "pad_token_id": 0,
    }
    return LlamaMoeConfig(**sizes | fields)


@pytest.fixture(scope="session")
def mixture_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("mixture")
    LlamaMoeForCausalLM(small_config()).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def ids():
    return torch.randint(1, 99, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.fixture
def quantized(mixture_folder, config):
    return LlamaMoeForCausalLM.from_pretrained(
        mixture_folder, dtype=torch.bfloat16, quantization_config=config
    ).eval()


@pytest.fixture
def plain(mixture_folder):
    return LlamaMoeForCausalLM.from_pretrained(mixture_folder, dtype=torch.bfloat16).eval()
