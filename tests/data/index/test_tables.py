"""Lists and tables in every format in which people and spreadsheets save them, read by every reader of the package."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.videos.odd_videos import write_plain

from cpr_fast.data.index.build import build_index
from cpr_fast.data.index.index import COLUMNS, Index, IndexFileError
from cpr_fast.data.index.tables import TableError, read_lines, read_table, read_text, table_text

FORMS = {
    "plain": lambda text: text.encode(),
    "byte-order mark": lambda text: text.encode("utf-8-sig"),
    "CRLF": lambda text: text.replace("\n", "\r\n").encode(),
    "CR": lambda text: text.replace("\n", "\r").encode(),
    "semicolon": lambda text: text.replace(",", ";").encode(),
    "tab": lambda text: text.replace(",", "\t").encode(),
    "no last line break": lambda text: text.rstrip("\n").encode(),
    "blank lines": lambda text: text.replace("\n", "\n\n").encode(),
    "columns in capitals": lambda text: re.sub(r"^(label|path),.*", lambda found: found[0].upper(), text).encode(),
    "header twice": lambda text: re.sub(r"^((?:label|path),.*\n)", r"\1\1", text).encode(),
    "blank lines above": lambda text: f"\n  \n{text}".encode(),
    "a line sep=": lambda text: re.sub(r"^((?:label|path),.*)", r"sep=,\n\1", text).encode(),
    "separators at the ends of rows": lambda text: (
        re.sub(r"(?m)^(.*)$", r"\1,,", text).encode() if re.match("(?:label|path),", text) else text.encode()
    ),
    "all at once": lambda text: text.replace(",", ";").replace("\n", "\r\n\r\n").encode("utf-8-sig"),
}
VIDEOS = ("A/v_A_g01_c01.mp4", "B/v_B_g01_c01.mp4")
INDEX = ",".join(COLUMNS) + "\nA/v_A_g01_c01.mp4,A,sä,train,5,25,64,48,\nB/v_B_g01_c01.mp4,B,t,test,5,25,64,48,\n"
LISTS = {
    "ucf101": {
        "classInd.txt": "1 A\n2 B\n",
        "trainlist01.txt": "A/v_A_g01_c01.avi 1\n",
        "testlist01.txt": "B/v_B_g01_c01.avi\n",
    },
    "hmdb51": {"walk_test_split1.txt": "v_A_g01_c01.avi 1\n", "run_test_split1.txt": "v_B_g01_c01.avi 2\n"},
    "kinetics": {
        "train.csv": "label,youtube_id,time_start,time_end,split\nA,v_A_g01_c01,1,2,train\n",
        "test.csv": "label,youtube_id,time_start,time_end,split\nB,v_B_g01_c01,1,2,test\n",
        "label_map.txt": "A\nB\n",
    },
    "coclr": {
        "train_split01.csv": "/x/A/v_A_g01_c01/,5\n",
        "test_split01.csv": "/x/B/v_B_g01_c01/,5\n",
        "ClassInd.txt": "1 A\n2 B\n",
    },
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for name in VIDEOS:
        write_plain(folder / name, 5)
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_an_index_is_read_in_every_form(root, form):
    (root / f"{form}.csv").write_bytes(FORMS[form](INDEX))
    index = Index.load(root / f"{form}.csv")
    assert [(v.path.name, v.label, v.source, v.split) for v in index] == [
        ("v_A_g01_c01.mp4", "A", "sä", "train"), ("v_B_g01_c01.mp4", "B", "t", "test"),
    ]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LISTS)
def test_split_lists_are_read_in_every_form(root, tmp_path, layout, form):
    for name, text in LISTS[layout].items():
        if form in ("semicolon", "tab", "all at once") and layout in ("ucf101", "hmdb51"):
            text = text.replace(" ", ",")  # which the format under test replaces
        (tmp_path / name).write_bytes(FORMS[form](text))
    index, problems = build_index(root, layout, tmp_path)
    names = ["walk", "run"] if layout == "hmdb51" else ["A", "B"]
    assert sorted((v.path.name, v.label, v.split) for v in index) == [
        ("v_A_g01_c01.mp4", names[0], "train"), ("v_B_g01_c01.mp4", names[1], "test"),
    ]  # fmt: skip
    assert not problems


def test_numbers_of_a_spreadsheet(root):
    (root / "sheet.csv").write_text(f"{';'.join(COLUMNS)}\n{VIDEOS[0]};A;s;train;5.0;29,97;64;48;\n;;;;;;;;\n")
    video = Index.load(root / "sheet.csv")[0]
    assert (video.num_frames, video.fps) == (5, 29.97)


@pytest.mark.parametrize("number", ["1,000", "12,345,678", " 2,000 ", "2147483648", "99999999999999999999"])
def test_a_thousands_separator_is_not_a_decimal_comma_and_a_number_beyond_int32_is_refused(root, number):
    (root / "sheet.csv").write_text(f"{';'.join(COLUMNS)}\n{VIDEOS[0]};A;s;train;{number};23,976;64;48;\n")
    with pytest.raises(IndexFileError, match=f"column num_frames: expected a positive whole number .*, got '{number}'"):
        Index.load(root / "sheet.csv")


def test_blanks_around_a_name_and_lines_of_blanks_do_not_count(root):
    text = (
        f"{', '.join(COLUMNS)}\n{VIDEOS[0]}, A , s, train ,5, 25, 64, 48,\n  \n{VIDEOS[1]},A,s,train,5,25,64,48,\n \t\n"
    )
    (root / "blanks.csv").write_text(text)
    index = Index.load(root / "blanks.csv")
    assert [(v.label, v.source, v.split, v.num_frames) for v in index] == [("A", "s", "train", 5)] * 2
    assert index.classes == ["A"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("path,label\n".encode("utf-16"), ": expected a UTF-8 CSV file, got UTF-16"),
        (b"\x00\x01\x02\x03", ": expected a UTF-8 CSV file, got a binary file"),
        (b'\n\na,b\n2,3\n"open,1\n5,6\n', r":5: .*unexpected end of data in the row that begins here"),
    ],
)
def test_a_table_that_cannot_be_read_is_named(tmp_path, content, message):
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(TableError, match=rf"x\.csv{message}"):
        read_table(tmp_path / "x.csv", ("a",))
    with pytest.raises(TableError, match="expected a split list, but .*gone.txt' does not exist"):
        list(read_lines(tmp_path / "gone.txt"))
    with pytest.raises(TableError, match="is a folder"):
        read_text(tmp_path)


def test_an_empty_path_is_named_and_blanks_around_a_path_do_not_count(root):
    (root / "sheet.csv").write_text(INDEX + ",A,s,train,5,25,64,48,\n")
    with pytest.raises(IndexFileError, match="sheet.csv:4, column path: expected a file, got ''"):
        Index.load(root / "sheet.csv")
    (root / "sheet.csv").write_text(INDEX.replace(".mp4,", ".mp4 ,").replace(",\n", ", \n"))
    assert [video.path for video in Index.load(root / "sheet.csv")] == [root / name for name in VIDEOS]


def test_a_class_name_in_latin_1_is_named(root):
    (root / "latin.csv").write_bytes(INDEX.replace("sä", "sa").encode().replace(b",A,", b",caf\xe9,"))
    with pytest.raises(IndexFileError, match=r"latin.csv:2, column label: expected UTF-8, got b'caf\\xe9'"):
        Index.load(root / "latin.csv")


FIELDS = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=12)


@given(st.lists(st.tuples(FIELDS, FIELDS, FIELDS).filter(any), min_size=1, max_size=5))
def test_what_is_written_is_read_back(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("table") / "x.csv"
    path.write_text(table_text(("path", "label", "split"), rows), encoding="utf-8", newline="")
    header, read = read_table(path, ("path", "label", "split"))
    assert header == ["path", "label", "split"] and [tuple(row) for _, row in read] == rows
