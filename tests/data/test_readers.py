"""Every layout as it is downloaded, against `datasets` and the standard library."""

import json

import numpy as np
import pytest

from moellava.data import Row, RowError, Turn, read_rows
from moellava.images import load_image
from moellava.testing import write_medmnist, write_pmc_vqa, write_slake, write_vqa_rad_authors


def write(path, rows) -> str:
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return str(path)


def llava_row(**changes):
    turns = [{"from": "human", "value": "<image>\nWhy?"}, {"from": "gpt", "value": "No."}]
    return {"id": "a-1", "image": "a.jpg", "conversations": turns} | changes


class TestLlava:
    def test_a_row_as_llava_has_it(self, tmp_path):
        (row,) = read_rows(
            write(tmp_path / "train.json", [llava_row(domain="ct")]), images=tmp_path
        )
        assert row == Row(
            id="a-1",
            images=(str(tmp_path / "a.jpg"),),
            turns=(Turn("user", "<image>\nWhy?"), Turn("assistant", "No.")),
            source="llava",
            extra={"domain": "ct"},
        )

    def test_the_misspelt_key_is_read(self, tmp_path):
        row = llava_row()
        row["conversatons"] = row.pop("conversations")
        assert read_rows(write(tmp_path / "t.json", [row]))[0].answer == "No."

    def test_lists_of_images_text_only_rows_and_marks_anywhere(self, tmp_path):
        two = [
            {"from": "human", "value": "Is <image> older than <image>?"},
            {"from": "gpt", "value": "Yes."},
        ]
        none = [{"from": "human", "value": "What is CT?"}, {"from": "gpt", "value": "Tomography."}]
        last = [{"from": "human", "value": "Why?\n<image>"}, {"from": "gpt", "value": "No."}]
        rows = [
            llava_row(image=["a.jpg", "b.jpg"], conversations=two),
            {"id": 7, "conversations": none},
        ]
        rows += [llava_row(conversations=last), llava_row(image=["a.jpg"])]
        read = read_rows(write(tmp_path / "t.json", rows))
        assert [len(row.images) for row in read] == [2, 0, 1, 1]
        assert read[1].id == "7"
        assert read[2].turns[0].text == "Why?\n<image>"

    @pytest.mark.parametrize(
        ("written", "read"), [("OPEN", "OPEN"), ("close", "CLOSED"), ("yes/no", "yes/no")]
    )
    def test_answer_types_in_every_spelling(self, tmp_path, written, read):
        path = write(tmp_path / "t.json", [llava_row(answer_type=written)])
        assert read_rows(path)[0].answer_type == read

    def test_json_lines_are_the_same(self, tmp_path):
        rows = [llava_row(id=str(number)) for number in range(5)]
        (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        assert list(read_rows(tmp_path / "t.jsonl")) == list(
            read_rows(write(tmp_path / "t.json", rows))
        )

    def test_questions_without_answers(self, tmp_path):
        (tmp_path / "q.jsonl").write_text(
            json.dumps({"question_id": 3, "image": "a.jpg", "text": "Why?"})
        )
        (row,) = read_rows(tmp_path / "q.jsonl")
        assert (row.id, row.answer, row.turns) == ("3", None, (Turn("user", "<image>\nWhy?"),))

    def test_messages_of_chat_templates(self, tmp_path):
        turns = [
            {"role": "user", "content": "<image>Why?"},
            {"role": "assistant", "content": "No."},
        ]
        (row,) = read_rows(write(tmp_path / "t.json", [{"messages": turns, "images": ["a.jpg"]}]))
        assert (row.source, row.question, row.answer, len(row.images)) == (
            "messages",
            "Why?",
            "No.",
            1,
        )


class TestHub:
    """By the real ids, from a filled cache, sockets blocked; `datasets` is the oracle."""

    @pytest.mark.parametrize(
        ("name", "source", "splits"),
        [
            ("flaviagiammarino/vqa-rad", "vqa_rad", ("train", "test")),
            ("flaviagiammarino/path-vqa", "path_vqa", ("train", "validation", "test")),
        ],
    )
    def test_parquet_equals_what_datasets_reads(
        self, dataset_cache, no_network, name, source, splits
    ):
        from datasets import load_dataset

        for split in splits:
            rows = read_rows(name, split=split)
            theirs = load_dataset(
                "parquet",
                data_files=str(dataset_cache[name] / "data" / f"{split}-*.parquet"),
                split="train",
            )
            assert len(rows) == len(theirs)
            for row, record in zip(rows, theirs, strict=True):
                assert (row.question, row.answer) == (record["question"], record["answer"])
                assert (row.source, row.split, row.answer_type) == (source, split, None)
                assert np.array_equal(
                    np.asarray(load_image(row.images[0])),
                    np.asarray(record["image"].convert("RGB")),
                )

    def test_a_folder_of_parquet_is_the_same(self, dataset_cache):
        name = "flaviagiammarino/vqa-rad"
        assert list(read_rows(dataset_cache[name], split="test", format="vqa_rad")) == list(
            read_rows(name, split="test")
        )

    def test_slake_in_one_language_with_its_archive_of_images(self, dataset_cache, no_network):
        rows = read_rows("BoKelvin/SLAKE", split="train", language="en")
        records = json.loads((dataset_cache["BoKelvin/SLAKE"] / "train.json").read_text())
        records = [record for record in records if record["q_lang"] == "en"]
        assert rows.num_not_asked == 3
        for row, record in zip(rows, records, strict=True):
            assert (row.id, row.question, row.answer) == (
                str(record["qid"]),
                record["question"],
                record["answer"],
            )
            assert row.answer_type == record["answer_type"]
            assert row.extra["modality"] == record["modality"]
            assert load_image(row.images[0]).size == (64, 48)
        assert len(read_rows("BoKelvin/SLAKE", split="train")) == 6

    @pytest.mark.parametrize(("split", "letter"), [("train", "C"), ("test_2", "B")])
    def test_both_versions_of_pmc_vqa(self, dataset_cache, no_network, split, letter):
        (row, _) = read_rows("RadGenome/PMC-VQA", split=split)
        assert row.choices == ("CT", "MRI", "None", "X-ray")
        assert row.answer == letter
        assert row.turns[0].text.startswith(
            "<image>\nWhat modality is shown, in short?\nA: CT\nB: MRI\nC: None\n"
        )
        assert load_image(row.images[0]).size == (64, 48)
        assert row.images[0].endswith(
            "images/PMC1_0.jpg" if split == "train" else "figures/PMC2_0.jpg"
        )

    def test_an_unknown_id_says_how_to_fetch_it(self, no_network):
        with pytest.raises(
            FileNotFoundError, match="hf download nobody/nothing --repo-type dataset"
        ):
            read_rows("nobody/nothing")


class TestAuthorsFiles:
    def test_vqa_rad_splits_by_phrase_type(self, tmp_path):
        folder = write_vqa_rad_authors(tmp_path / "rad")
        test, train = (read_rows(folder, split=split) for split in ("test", "train"))
        assert ([row.id for row in test], [row.id for row in train]) == (
            ["2", "5"],
            ["0", "1", "3", "4"],
        )
        assert (train[0].answer_type, test[1].answer) == ("CLOSED", "3")
        assert len(read_rows(folder)) == 6
        assert load_image(test[0].images[0]).size == (64, 48)

    def test_slake_and_pmc_vqa_with_their_images_unpacked(self, tmp_path):
        slake = write_slake(tmp_path / "slake", zipped=False)
        assert load_image(read_rows(slake / "test.json")[0].images[0]).size == (64, 48)
        pmc = write_pmc_vqa(tmp_path / "pmc", zipped=False)
        assert load_image(read_rows(pmc / "train_2.csv")[0].images[0]).size == (64, 48)
        assert read_rows(pmc / "test.csv", images=pmc / "images")[0].answer == "C"

    def test_a_pickle_is_refused(self, tmp_path):
        (tmp_path / "train_qa.pkl").write_bytes(b"x")
        with pytest.raises(ValueError, match="is a pickle, which can run code"):
            read_rows(tmp_path / "train_qa.pkl")


class TestClassification:
    def test_medmnist_labels_become_answers(self, tmp_path):
        path = write_medmnist(tmp_path / "pathmnist.npz")
        rows = read_rows(path, split="test", class_names=["adipose", "debris", "mucus"])
        arrays = np.load(path)
        assert [row.answer for row in rows] == ["adipose", "debris", "mucus"]
        assert rows[1].question == "Which of these does the image show: adipose, debris, mucus?"
        for row, image in zip(rows, arrays["test_images"], strict=True):
            assert np.array_equal(np.asarray(load_image(row.images[0])), image)

    def test_several_labels_at_once(self, tmp_path):
        path = write_medmnist(tmp_path / "chestmnist.npz", multi_label=True)
        names = [f"finding {number}" for number in range(14)]
        rows = read_rows(path, split="train", class_names=names, question="Which findings?")
        labels = np.load(path)["train_labels"]
        for row, label in zip(rows, labels, strict=True):
            expected = ", ".join(name for name, is_on in zip(names, label, strict=True) if is_on)
            assert (row.question, row.answer) == ("Which findings?", expected or "none of these")

    def test_an_image_set_of_the_hub_brings_its_names(self, tmp_path):
        from datasets import ClassLabel, Dataset, Features, Image

        from moellava.testing.datasets import picture

        features = Features({"image": Image(), "label": ClassLabel(names=["benign", "malignant"])})
        table = {"image": [picture(0), picture(1)], "label": [1, 0]}
        Dataset.from_dict(table, features=features).to_parquet(tmp_path / "train.parquet")
        assert [row.answer for row in read_rows(tmp_path / "train.parquet")] == [
            "malignant",
            "benign",
        ]

    def test_errors(self, tmp_path):
        path = write_medmnist(tmp_path / "my.npz")
        with pytest.raises(ValueError, match=r"which split.*train, val, test"):
            read_rows(path)
        with pytest.raises(ValueError, match="what are the classes called"):
            read_rows(path, split="train")
        with pytest.raises(RowError, match=r"my\.npz, row 1: the label is 1; expected 0 to 0"):
            read_rows(path, split="train", class_names=["only"])


class TestErrors:
    BROKEN = (
        ({"conversations": None}, "'conversations' is missing"),
        ({"conversations": [{"from": "human"}]}, r"turn 0 has no 'value'; it has \['from'\]"),
        (
            {"conversations": [{"from": "alien", "value": "x"}]},
            "turn 0 is from 'alien'; expected one of human",
        ),
        (
            {"conversations": [{"from": "human", "value": 3}]},
            "'value' of turn 0 is a int; expected text",
        ),
        ({"conversations": ["Why?"]}, "turn 0 is a str"),
        ({"image": ["a.jpg", "b.jpg"]}, "1 <image> marks for 2 images"),
        ({"image": None}, "1 <image> marks for 0 images"),
        ({"image": 3}, "an image is a int"),
        ({"video": "a.mp4"}, "it has a 'video'"),
    )

    @pytest.mark.parametrize(("change", "message"), BROKEN)
    def test_a_malformed_row_names_file_number_and_id(self, tmp_path, change, message):
        path = write(tmp_path / "train.json", [llava_row(), llava_row(id="bad-7", **change)])
        with pytest.raises(RowError, match=rf"train\.json, row 1 \(id 'bad-7'\): .*{message}"):
            read_rows(path)

    def test_skip_bad_counts_and_lists_them(self, tmp_path, caplog):
        rows = [
            llava_row(id="good"),
            *(llava_row(id=f"bad-{n}", **change) for n, (change, _) in enumerate(self.BROKEN)),
        ]
        read = read_rows(
            write(tmp_path / "t.json", [*rows, "no object", llava_row(id="also good")]),
            skip_bad=True,
        )
        assert [row.id for row in read] == ["good", "also good"]
        assert [bad.id for bad in read.bad] == [f"bad-{n}" for n in range(len(self.BROKEN))] + [
            None
        ]
        assert [bad.index for bad in read.bad] == list(range(1, 11))
        assert "10 of 12 rows left out" in caplog.text
        assert [read.number(0), read.number(1)] == [0, 11]

    def test_a_row_of_a_table_is_named_too(self, tmp_path):
        (tmp_path / "train.csv").write_text("image,question,answer\na.jpg,Why?,No\nb.jpg,,No\n")
        with pytest.raises(RowError, match=r"train\.csv, row 1: the question is empty"):
            read_rows(tmp_path / "train.csv")

    def test_an_image_that_a_table_lacks_is_found_without_reading_images(self, tmp_path):
        from datasets import Dataset, Features, Image, Value

        from moellava.testing.datasets import picture

        features = Features(
            {"image": Image(), "question": Value("string"), "answer": Value("string")}
        )
        table = {"image": [picture(0), None], "question": ["Why?"] * 2, "answer": ["No"] * 2}
        Dataset.from_dict(table, features=features).to_parquet(tmp_path / "train.parquet")
        with pytest.raises(RowError, match=r"row 1: it has no image"):
            read_rows(tmp_path / "train.parquet")

    def test_text_that_looks_like_a_number_or_nothing_stays_text(self, tmp_path):
        (tmp_path / "t.csv").write_text('id,image,question,answer\n007,a.jpg,"How, many?",None\n')
        (row,) = read_rows(tmp_path / "t.csv")
        assert (row.id, row.question, row.answer) == ("007", "How, many?", "None")

    def test_unknown_names_suggest_the_nearest(self, tmp_path, dataset_cache):
        path = write(tmp_path / "t.json", [llava_row()])
        with pytest.raises(ValueError, match=r"Unknown format 'lava'. Did you mean 'llava'"):
            read_rows(path, format="lava")
        with pytest.raises(ValueError, match=r"several splits.*test, train, validation"):
            read_rows("flaviagiammarino/path-vqa")
        with pytest.raises(ValueError, match="Did you mean 'validation'"):
            read_rows("flaviagiammarino/path-vqa", split="validatoin")
        with pytest.raises(
            ValueError, match=r"no usable row of split 'train' among 1\. Leave split out"
        ):
            read_rows(path, split="train")
        with pytest.raises(
            ValueError, match=r"Cannot tell the layout of .* from its columns \['x'\]"
        ):
            read_rows(write(tmp_path / "x.json", [{"x": 1}]))
        with pytest.raises(FileNotFoundError, match=r"no file or folder .*nowhere\.json"):
            read_rows(tmp_path / "nowhere.json")
        with pytest.raises(FileNotFoundError, match=r"image folder .* does not exist"):
            read_rows(path, images=tmp_path / "nowhere")
        (tmp_path / "t.xlsx").touch()
        with pytest.raises(ValueError, match=r"is a \.xlsx file; expected one of \.json"):
            read_rows(tmp_path / "t.xlsx")


def test_answer_types_are_derived_only_where_asked(dataset_cache):
    plain, derived = (
        read_rows("flaviagiammarino/vqa-rad", split="train", derive_answer_type=derive)
        for derive in (False, True)
    )
    assert {row.answer_type for row in plain} == {None}
    assert [row.answer_type for row in derived] == [
        "CLOSED" if row.answer in ("yes", "no") else "OPEN" for row in plain
    ]


def test_rows_work_in_the_workers_of_a_loader(dataset_cache, tmp_path):
    from torch.utils.data import DataLoader

    for rows in (
        read_rows(write(tmp_path / "t.json", [llava_row(id=str(n)) for n in range(8)])),
        read_rows("flaviagiammarino/vqa-rad", split="train"),
    ):
        loader = DataLoader(rows, batch_size=2, num_workers=2, collate_fn=list)
        assert [row for batch in loader for row in batch] == list(rows)
