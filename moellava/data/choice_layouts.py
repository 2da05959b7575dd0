"""Multiple-choice sets, a record → `Row`: PMC-VQA and OmniMedVQA; see `moellava.data.layouts`."""

from moellava.data.layouts import (
    Context,
    Record,
    asked,
    first_taken,
    needed_images,
    row_of,
    taken,
    text_of,
)
from moellava.data.rows import Row, RowError, Turn

PMC_VQA_PROMPT = "Answer with the option's letter from the given choices directly."
OMNIMEDVQA_PROMPT = "Answer with one of these options:"


def pmc_vqa(record: Record, index: int, context: Context) -> Row:
    """PMC-VQA: four choices; the answer is the letter (`Answer_label` in version 1, `Answer` in 2).

    Columns of version 1, as its card shows: Figure_path, Question, Answer, Choice A to D,
    Answer_label; of version 2, as the code of its users reads: index, Figure_path, Caption,
    Question, Choice A to D, Answer, split.
    """
    letters = "ABCD"
    columns = [f"Choice {letter}" for letter in letters]
    (figure, question, answer, *written), rest = taken(
        record, "Figure_path", "Question", "Answer", *columns
    )
    row_id, rest = first_taken(rest, "index")
    label, rest = first_taken(rest, "Answer_label")
    # Choices are written " A:text ".
    choices = [
        text_of(text, column).strip().removeprefix(f"{letter}:").strip()
        for text, column, letter in zip(written, columns, letters, strict=True)
    ]
    label = str(label or answer).strip()
    if label not in tuple(letters):
        raise RowError(f"the answer is {label!r}; expected one of the letters {', '.join(letters)}")
    options = [f"{letter}: {choice}" for letter, choice in zip(letters, choices, strict=True)]
    images = needed_images(figure, context)
    prompt = "\n".join([text_of(question, "Question").strip(), *options, PMC_VQA_PROMPT])
    return row_of(
        rest | {"id": row_id} | ({"Answer": answer} if answer != label else {}),
        index,
        context,
        source="pmc_vqa",
        images=images,
        turns=[asked(prompt, images), Turn("assistant", label)],
        choices=choices,
    )


def omnimedvqa(record: Record, index: int, context: Context) -> Row:
    """OmniMedVQA's JSON: `option_A` to `option_D` (some questions have two), `gt_answer` as text.

    The options are lines below the question; the answer is the text of the right one, which is what
    its authors compare answers with. `dataset`, `question_type` and `modality_type` are kept.
    """
    (row_id, image, question, answer), rest = taken(
        record, "question_id", "image_path", "question", "gt_answer"
    )
    columns = [f"option_{letter}" for letter in "ABCDEF" if record.get(f"option_{letter}")]
    written, rest = taken(rest, *columns)
    choices = [text_of(text, column).strip() for text, column in zip(written, columns, strict=True)]
    if len(choices) < 2:
        raise RowError(f"it has {len(choices)} options; expected option_A and option_B at least")
    images = needed_images(image, context)
    asks = [text_of(question, "question").strip(), OMNIMEDVQA_PROMPT, *choices]
    return row_of(
        rest | {"id": row_id},
        index,
        context,
        source="omnimedvqa",
        images=images,
        turns=[
            asked("\n".join(asks), images),
            Turn("assistant", text_of(answer, "gt_answer").strip()),
        ],
        choices=choices,
    )
