"""The layouts of datasets that are read: `FORMATS`, a row for each, and `register_format`."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from moellava.data import choice_layouts, layouts
from moellava.data.layouts import Context, Record
from moellava.data.rows import Row
from moellava.messages import unknown_name
from moellava.plugins import load_plugins

ToRow = Callable[[Record, int, Context], Row | None]
Matches = Callable[[Collection[str], str], bool]


@dataclass(frozen=True, kw_only=True)
class Format:
    """One layout of a dataset: everything that is known about it.

    Args:
        name: what `format=` says.
        to_row: `(record, index, context) -> Row`, or None for a record that was not asked for
            (another split or language); raises `RowError` or `KeyError` for a broken one.
        matches: `(columns, name of the file or repo in lower case) -> bool`, for `format="auto"`.
        image_keys: the columns that hold images.
        id_keys: the columns that name a row, the first that has a value.
        image_folders: where its images lie, seen from the file.
        archives: which zip archives beside the file hold the images of a split (None if not known).
    """

    name: str
    to_row: ToRow
    matches: Matches = lambda columns, name: False
    image_keys: tuple[str, ...] = ("image", "images")
    id_keys: tuple[str, ...] = ("id",)
    image_folders: tuple[str, ...] = ()
    archives: Callable[[str | None], Sequence[str]] = lambda split: ()


def has(*columns: str) -> Matches:
    """For `Format.matches`: files with all of these columns."""
    return lambda found, name: set(columns) <= set(found)


def _is_vqa_rad(columns: Collection[str], name: str) -> bool:
    is_authors = {"image_name", "question", "answer", "phrase_type"} <= set(columns)
    return is_authors or ({"image", "question", "answer"} <= set(columns) and "rad" in name)


def _is_path_vqa(columns: Collection[str], name: str) -> bool:
    return {"image", "question", "answer"} <= set(columns) and "path" in name


def _pmc_vqa_archives(split: str | None) -> Sequence[str]:
    """The second version has files and an archive of its own, all named with _2."""
    if split is None:
        return ("images.zip", "images_2.zip")
    return ("images_2.zip",) if split.endswith("_2") else ("images.zip",)


# The first match wins, so layouts with telling columns stand before plain ones.
FORMATS: list[Format] = [
    Format(
        name="slake",
        to_row=layouts.slake,
        matches=has("question", "answer", "q_lang", "qid"),
        image_keys=("image", "img_name"),
        id_keys=("qid",),
        image_folders=("imgs",),
        archives=lambda split: ("imgs.zip",),
    ),
    Format(
        name="pmc_vqa",
        to_row=choice_layouts.pmc_vqa,
        matches=has("Figure_path", "Question", "Answer", "Choice A"),
        image_keys=("Figure_path",),
        id_keys=("index",),
        image_folders=("images", "figures", "images_2/figures", "images_2"),
        archives=_pmc_vqa_archives,
    ),
    Format(
        name="omnimedvqa",
        to_row=choice_layouts.omnimedvqa,
        matches=has("question", "gt_answer", "option_A", "image_path"),
        image_keys=("image_path",),
        id_keys=("question_id",),
        # The files are OmniMedVQA/QA_information/*/*.json, and their paths start at OmniMedVQA.
        image_folders=("../..", "..", "images"),
    ),
    Format(
        name="vqa_rad",
        to_row=layouts.vqa_rad,
        matches=_is_vqa_rad,
        image_keys=("image", "image_name"),
        id_keys=("id", "qid"),
        image_folders=("VQA_RAD Image Folder", "images"),
    ),
    Format(
        name="path_vqa",
        to_row=layouts.path_vqa,
        matches=_is_path_vqa,
        image_folders=("images",),
    ),
    Format(
        name="llava",
        to_row=layouts.llava,
        matches=lambda columns, name: "conversations" in columns or "conversatons" in columns,
        image_folders=("images",),
    ),
    Format(
        name="messages",
        to_row=layouts.messages,
        matches=has("messages"),
        image_folders=("images",),
    ),
    Format(
        name="questions",
        to_row=layouts.questions,
        matches=has("question_id", "text"),
        id_keys=("question_id",),
        image_folders=("images",),
    ),
    Format(
        name="vqa",
        to_row=layouts.vqa,
        matches=has("image", "question", "answer"),
        image_folders=("images",),
    ),
    Format(
        name="classification",
        to_row=layouts.classification,
        matches=has("image", "label"),
    ),
]


def register_format(form: Format) -> None:
    """Add a layout, for `read_rows(format=name)` and, if its `matches` says so, for "auto".

    It is asked before the built-in ones. An installed package registers through the entry-point
    group `moellava.formats`.

    Raises:
        ValueError: the name is taken.
    """
    same_name = next((known for known in FORMATS if known.name == form.name), None)
    if same_name is None:
        FORMATS.insert(0, form)
    elif same_name != form:
        raise ValueError(f"The format name {form.name!r} is taken; choose another name.")


def find_format(name: str, columns: Collection[str], source: str) -> Format:
    """The format of that name; for "auto", the first that matches the columns and the name.

    Raises:
        ValueError: there is none; those that are known are listed.
    """
    load_plugins("moellava.formats")
    if name != "auto":
        known = {form.name: form for form in FORMATS}
        if name not in known:
            raise unknown_name("format", name, known)
        return known[name]
    for form in FORMATS:
        if form.matches(columns, source.lower()):
            return form
    raise ValueError(
        f"Cannot tell the layout of {source} from its columns {sorted(columns)}. "
        f"Give format, one of {', '.join(form.name for form in FORMATS)}; or rename the columns of "
        "a table to image, question and answer."
    )
