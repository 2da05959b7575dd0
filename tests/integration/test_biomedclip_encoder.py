"""The check of the BiomedCLIP guide: the encoder alone, then the whole model. Runs under pytest and
as a script:

python tests/integration/test_biomedclip_encoder.py [TOWER] [LANGUAGE_MODEL]
"""

import sys

from moellava.verify import DEFAULT_LANGUAGE_MODEL, DEFAULT_TOWER, Check, verify


def report(check: Check) -> str:
    return f"{'pass' if check.passed else 'FAIL'}  {check.name}: {check.detail}"


def test_biomedclip_and_tinyllama_pass_every_step(hub_cache, no_network):
    checks = list(verify())
    assert [check.name for check in checks if not check.passed] == []
    details = {check.name: check.detail for check in checks}
    assert details["encoder alone"] == "196 patch tokens of width 768, real, 14x14 grid"
    assert "model answers" in details


def main() -> int:
    tower, language_model = (
        sys.argv[1:] + [DEFAULT_TOWER, DEFAULT_LANGUAGE_MODEL][len(sys.argv) - 1 :]
    )[:2]
    passed = True
    for check in verify(tower, language_model):
        print(report(check))
        passed = passed and check.passed
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
