"""Stand-ins of published datasets: their files, columns and quirks, a few rows, drawn pictures."""

import csv
import io
import json
import shutil
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

# (question, answer, answer type as VQA-RAD's authors and SLAKE have it)
QUESTIONS = (
    ("Is there evidence of an aortic aneurysm?", "yes", "CLOSED"),
    ("What organ is shown?", "Lung", "OPEN"),
    ("Is the heart enlarged?", "No", "CLOSED"),
    ("Which side is affected, left or right?", "Left", "CLOSED"),
)


def picture(seed: int, *, size: tuple[int, int] = (64, 48), mode: str = "RGB") -> Image.Image:
    """A picture that differs from those of other seeds: soft blobs of random place and size."""
    generator = np.random.default_rng(seed)
    small = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC).convert(mode)


def write_vqa_rad(folder: Path) -> Path:
    """`flaviagiammarino/vqa-rad`: parquet with image, question, answer; no id, no answer type."""
    return _write_hub_vqa(folder, {"train": 6, "test": 3}, mode="RGB")


def write_path_vqa(folder: Path) -> Path:
    """`flaviagiammarino/path-vqa`: the same columns, three splits, some pictures in CMYK."""
    return _write_hub_vqa(folder, {"train": 6, "validation": 3, "test": 3}, mode="CMYK")


def write_vqa_rad_authors(folder: Path) -> Path:
    """The authors' VQA-RAD: a JSON whose phrase type marks the test rows, and a folder of JPEGs."""
    images = folder / "VQA_RAD Image Folder"
    images.mkdir(parents=True)
    rows: list[dict[str, object]] = []
    for index in range(6):
        question, answer, answer_type = QUESTIONS[index % len(QUESTIONS)]
        name = f"synpic{index // 2}.jpg"
        picture(index // 2).save(images / name)
        rows.append(
            {
                "qid": index,
                "phrase_type": ("freeform", "para", "test_freeform")[index % 3],
                "qid_linked_id": f"03f451ca-{index}",
                "image_case_url": f"https://medpix.example/case/{index}",
                "image_name": name,
                "image_organ": "CHEST",
                "evaluation": "not evaluated",
                "question": question,
                "question_rephrase": "NULL",
                "question_relation": "NULL",
                "question_frame": "NULL",
                "question_type": "PRES",
                "answer": 3 if index == 5 else answer,  # numbers stand among the answers
                "answer_type": f"{answer_type} "
                if index == 0
                else answer_type,  # one has a space behind
            }
        )
    (folder / "VQA_RAD Dataset Public.json").write_text(json.dumps(rows, indent=1))
    return folder


def write_slake(folder: Path, *, zipped: bool = True) -> Path:
    """`BoKelvin/SLAKE`: a JSON per split in two languages, pictures in `imgs.zip`."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {}
    for number in range(3):
        name = f"xmlab{number}/source.jpg"
        target = folder / "imgs" / name
        target.parent.mkdir(parents=True)
        picture(number).save(target)
        names[name] = target
    qid = 0
    for split, count in {"train": 6, "validation": 2, "test": 2}.items():
        rows = []
        for index in range(count):
            question, answer, answer_type = QUESTIONS[index % len(QUESTIONS)]
            is_chinese = index % 2 == 1
            rows.append(
                {
                    "img_id": index % 3,
                    "img_name": f"xmlab{index % 3}/source.jpg",
                    "question": "图中是什么器官?" if is_chinese else question,
                    "answer": "肺" if is_chinese else answer,
                    "q_lang": "zh" if is_chinese else "en",
                    "location": "Lung",
                    "modality": "X-Ray",
                    "answer_type": answer_type,
                    "base_type": "vqa",
                    "content_type": "Organ",
                    "triple": ["vhead", "_", "_"],
                    "qid": qid,
                }
            )
            qid += 1
        (folder / f"{split}.json").write_text(
            json.dumps(rows, ensure_ascii=False), encoding="utf-8"
        )
    if zipped:
        _zip(folder / "imgs.zip", {f"imgs/{name}": path for name, path in names.items()})
        shutil.rmtree(folder / "imgs")
    return folder


def write_pmc_vqa(folder: Path, *, zipped: bool = True) -> Path:
    """`RadGenome/PMC-VQA`: CSV of both versions, four choices, pictures in two zip files."""
    folder.mkdir(parents=True, exist_ok=True)
    choices = [
        f" {letter}:{text} "
        for letter, text in zip("ABCD", ("CT", "MRI", "None", "X-ray"), strict=True)
    ]
    letters = [f"Choice {letter}" for letter in "ABCD"]
    for place, number in (("images", 1), ("images_2/figures", 2)):
        (folder / place).mkdir(parents=True)
        for index in range(2):
            picture(10 * number + index).save(folder / place / f"PMC{number}_{index}.jpg")
    question = " What modality is shown, in short? "
    first = [["Figure_path", "Question", "Answer", *letters, "Answer_label"]]
    first += [[f"PMC1_{index}.jpg", question, " None", *choices, "C"] for index in range(2)]
    second = [["index", "Figure_path", "Caption", "Question", *letters, "Answer", "split"]]
    for split in ("train", "test"):
        _write_csv(folder / f"{split}.csv", first)
        rows = [[str(i), f"PMC2_{i}.jpg", "A, b", question, *choices, "B", split] for i in range(2)]
        _write_csv(folder / f"{split}_2.csv", [*second, *rows])
    if zipped:
        for archive, inside in (("images", "images"), ("images_2", "figures")):
            paths = sorted((folder / archive).rglob("*.jpg"))
            _zip(folder / f"{archive}.zip", {f"{inside}/{path.name}": path for path in paths})
            shutil.rmtree(folder / archive)
    return folder


def write_omnimedvqa(folder: Path) -> Path:
    """OmniMedVQA as it unpacks: `QA_information/Open-access/CASE.json` and `Images`."""
    (folder / "Images" / "CASE").mkdir(parents=True)
    rows: list[dict[str, object]] = []
    for index in range(4):
        name = f"Images/CASE/{index // 2}.png"
        picture(index // 2).save(folder / name)
        options = ("CT", "MRI", "Ultrasound", "X-ray") if index % 2 == 0 else ("No", "Yes")
        named = {f"option_{letter}": text for letter, text in zip("ABCD", options, strict=False)}
        rows.append(
            {
                "dataset": "CASE",
                "question_id": f"CASE_{index:04d}",
                "question_type": "Modality Recognition" if index % 2 == 0 else "Disease Diagnosis",
                "question": ("What modality is shown?", "Is there a lesion?")[index % 2],
                "gt_answer": options[1],
                "image_path": name,
                **named,
                "modality_type": "MR (Mag-netic Resonance Imaging)",
            }
        )
    place = folder / "QA_information" / "Open-access"
    place.mkdir(parents=True)
    (place / "CASE.json").write_text(json.dumps(rows))
    return folder


def write_medmnist(path: Path, *, multi_label: bool = False, side: int = 28) -> Path:
    """A MedMNIST file: `<split>_images` (N, H, W, 3) and `<split>_labels` (N, 1).

    Multi-label ones are grey, with labels (N, 14).
    """
    generator = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for split, count in {"train": 6, "val": 2, "test": 3}.items():
        shape = (count, side, side) if multi_label else (count, side, side, 3)
        arrays[f"{split}_images"] = generator.integers(0, 256, shape, dtype=np.uint8)
        labels = (
            generator.integers(0, 2, (count, 14)) if multi_label else np.arange(count)[:, None] % 3
        )
        arrays[f"{split}_labels"] = labels.astype(np.uint8)
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]  # numpy: allow_pickle is bool
    return path


DATASETS: dict[str, Callable[..., Path]] = {
    "flaviagiammarino/vqa-rad": write_vqa_rad,
    "flaviagiammarino/path-vqa": write_path_vqa,
    "BoKelvin/SLAKE": write_slake,
    "RadGenome/PMC-VQA": write_pmc_vqa,
}


def _write_hub_vqa(folder: Path, splits: dict[str, int], mode: str) -> Path:
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    (folder / "data").mkdir(parents=True, exist_ok=True)
    features = Features(
        {"image": ImageFeature(), "question": Value("string"), "answer": Value("string")}
    )
    seed = 0
    for split, count in splits.items():
        rows: dict[str, list[object]] = {"image": [], "question": [], "answer": []}
        for index in range(count):
            buffer = io.BytesIO()
            picture(seed + index // 2, mode=mode if index % 2 else "RGB").save(buffer, "JPEG")
            question, answer, _ = QUESTIONS[index % len(QUESTIONS)]
            rows["image"].append({"bytes": buffer.getvalue(), "path": None})
            rows["question"].append(question.lower())
            rows["answer"].append(answer.lower())
        seed += count
        table = Dataset.from_dict(rows, features=features)
        table.to_parquet(str(folder / "data" / f"{split}-00000-of-00001-e5bc3d208bb4deeb.parquet"))
    return folder


def _write_csv(path: Path, rows: Sequence[Sequence[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def _zip(path: Path, members: dict[str, Path]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, file in members.items():
            archive.write(file, name)
