import pytest
import torch

from moellava.model.checkpoint.tower_identity import TowerIdentity, weights_fingerprint


class TestIdentity:
    def test_the_fingerprint_is_the_same_in_bfloat16_and_unknown_in_float16(self):
        weights = {"a": torch.randn(300, 5), "b": torch.randn(3)}
        as_bfloat16 = {name: value.bfloat16() for name, value in weights.items()}
        assert weights_fingerprint(weights) == weights_fingerprint(as_bfloat16)
        assert weights_fingerprint({name: value.half() for name, value in weights.items()}) is None

    @pytest.mark.parametrize("place", [(0, 0), (-1, -1)])
    def test_a_trained_weight_has_another_fingerprint(self, place):
        weight = torch.randn(300, 5)
        before = weights_fingerprint({"a": weight})
        weight[place] += 1
        assert weights_fingerprint({"a": weight}) != before

    def test_without_weights_a_folders_name_stands_for_the_id_that_ends_with_it(self):
        hub = TowerIdentity(tower="microsoft/BiomedCLIP", revision="a" * 40)
        assert hub.differs_from(TowerIdentity(tower="biomedclip")) == []
        assert hub.differs_from(TowerIdentity(tower="clip", revision="b" * 40)) == [
            "tower",
            "revision",
        ]
