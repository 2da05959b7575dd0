"""Imports point downwards without circles, and the package keeps its shape."""

import subprocess
import sys

import pytest

from tests import house


def test_imports_point_downwards_without_circles():
    """The contracts in pyproject.toml; lazy imports and those for type checkers are read, too."""
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command as run; run()",
    ]
    result = subprocess.run(
        [*command, "--no-cache"], capture_output=True, text=True, cwd=house.PACKAGE.parent
    )
    assert result.returncode == 0, result.stdout


# Modules whose tests are in another place than theirs, and where: they only show in a larger whole.
TESTED_ELSEWHERE = {
    "chat/replies.py": "chat/test_server.py",
    "chat/transcript.py": "chat/test_terminal.py",
    "chat/web/page.py": "chat/web/test_browser.py",
    "chat/web/page_guard.py": "chat/web/test_app.py",
    "chat/web/render.py": "chat/web/test_session.py",
    "cli/chat.py": "chat/test_terminal.py",
    "cli/demo.py": "test_readme.py",
    "cli/model_options.py": "cli/test_main.py",
    "cli/serve.py": "chat/test_server.py",
    "cli/train.py": "train/test_plan.py",
    "cli/web.py": "chat/web/test_app.py",
    "demo/parts.py": "train/test_three_stages.py",
    "encoders/clip.py": "encoders/test_transformers.py",
    "encoders/dinov2.py": "encoders/test_transformers.py",
    "encoders/siglip.py": "encoders/test_transformers.py",
    "encoders/siglip2.py": "encoders/test_transformers.py",
    "eval/answering.py": "train/test_answers.py",
    "eval/option_tokens.py": "eval/test_asking.py",
    "eval/results.py": "eval/test_report.py",
    "eval/score_table.py": "eval/test_scores.py",
    "eval/scorers/vqa_words.py": "eval/scorers/test_llava_med.py",
    "experiment/card.py": "experiment/test_run.py",
    "experiment/picture.py": "experiment/test_run.py",
    "experiment/reading.py": "experiment/test_options.py",
    "experiment/table.py": "experiment/test_results.py",
    "explain/drawing/figures.py": "explain/drawing/test_overlays.py",
    "images/image_like.py": "images/test_reading.py",
    "images/optional.py": "images/test_dicom.py",
    "model/load_options.py": "model/test_builder_enhanced.py",
    "testing/datasets.py": "data/test_formats.py",
    "testing/llava.py": "model/checkpoint/test_llava.py",
    "train/finish.py": "train/log/test_moved.py",
    "train/reward_rows.py": "train/test_reward_stage.py",
    "train/reward_trainer.py": "train/test_reward_stage.py",
    "train/sharding.py": "train/test_distributed.py",
    "train/stage_trainer.py": "train/test_trainer.py",
    "verify.py": "cli/test_verify.py",
}


def test_a_modules_tests_are_where_one_looks_for_them():
    tests = house.PACKAGE.parent / "tests"
    elsewhere = set()
    for path in house.python_files(house.PACKAGE):
        module = path.relative_to(house.PACKAGE)
        mirror = module.with_name(f"test_{module.name.lstrip('_')}")
        if not path.name.startswith("__") and not (tests / mirror).is_file():
            elsewhere.add(module.as_posix())
    assert elsewhere == TESTED_ELSEWHERE.keys()
    assert [name for name in TESTED_ELSEWHERE.values() if not (tests / name).is_file()] == []


@pytest.mark.parametrize("name", house.LIMITS)
def test_the_package_keeps_its_shape(name):
    assert house.measure()[name] <= house.LIMITS[name]


def test_a_circle_is_found(tmp_path):
    package = tmp_path / "toy"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "a.py").write_text("def f():\n    from toy import b\n")
    (package / "b.py").write_text("from toy.c import x\n")
    (package / "c.py").write_text("from toy.a import f\nx = f\n")
    (package / "d.py").write_text("import toy.a\n")
    assert house.modules_in_circles(package) == {"toy.a", "toy.b", "toy.c"}
