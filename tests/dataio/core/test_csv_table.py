"""Strict tables: every row is what its line says, or an error that names the line."""

import pytest

from dataio.core.csv_table import CsvTable, is_utf8
from dataio.core.errors import UserError

HEAD = "path,generator,object\n"
GOOD = {
    "plain": (HEAD + "a,b,c\n", [("a", "b", "c")]),
    "no last line end": (HEAD + "a,b,c", [("a", "b", "c")]),
    "blank lines": ("\n" + HEAD + "\n  \na,b,c\n\n\n", [("a", "b", "c")]),
    "quotes after spaces": (HEAD + 'a, "b" , "c, d"\n', [("a", "b", "c, d")]),
    "doubled quotes": (HEAD + 'a,b,"24"" screen"\n', [("a", "b", '24" screen')]),
    "empty fields": (HEAD + 'a,"",\n', [("a", "", "")]),
    "Windows": ("\ufeff" + HEAD.replace("\n", "\r\n") + "a,b,c\r\n\r\n", [("a", "b", "c")]),
    "old Mac": (HEAD.replace("\n", "\r") + "a,b,c\rd,e,f", [("a", "b", "c"), ("d", "e", "f")]),
    "other case": (' Path , "GENERATOR",object \na,b,c\n', [("a", "b", "c")]),
    "a spreadsheet's empty columns": ("path,generator,object,,\na,b,c,,\n", [("a", "b", "c")]),
    "pandas' index": (",path,generator,object\n0,a,b,c\n", [("a", "b", "c")]),
    "line breaks in another column": (
        'path,generator,object,prompt\na,b,c,"a cat,\n\nsitting ""here""\non a, mat"\nd,e,f,"g"\n',
        [("a", "b", "c"), ("d", "e", "f")],
    ),
    "commas in another column's lines": (
        'path,generator,object,prompt\na.png,b,c,"a cat\ntree, blue sky, 8k, soft\n"\nd.png,e,f,g\n',
        [("a.png", "b", "c"), ("d.png", "e", "f")],
    ),
    "a tab in another column": ("path,generator,object,text\na,b,c,d\te\n", [("a", "b", "c")]),
}
BAD = {
    "a quote that is never closed": ('a,b,"c\nd,e,f\n', r"line 2: a quote is opened and not closed .*'\"c'"),
    "a quote that another row closes": ('a,b,"c\nd,e,f"\n', r"line 2: a quote is opened and not closed"),
    "a line break in quotes": ('a,b,c\nd,e,"f\ng"\n', r"line 3: a quote is opened and not closed"),
    "a quote inside": ('a,b,c"d\n', r"line 2: a quote stands inside a value, at 'c\"d'"),
    "text after a quote": ('a,b,"c"d\n', r"line 2: a quote stands inside a value"),
    "quotes in quotes": ('a,b,""c""\n', r"line 2: a quote stands inside a value"),
    "too many fields": ("a,b,crane, bird\n", r"line 2: 4 fields, expected 3 .*in quotes"),
    "a comma at the end": ("a,b,c,\n", r"line 2: 4 fields, expected 3"),
    "too few fields": ("a,b,c\n\na,b\n", r"line 4: 2 fields, expected 3 \(path, generator, object\)"),
    "one field": ("a\n", r"line 2: 1 field, expected 3"),
    "other separators below the header": ("a;b;c\n", r"line 2: 1 field, .* separated by ';' there"),
    "the header again, marked": ("\ufeff" + HEAD, r"line 2: repeats the header"),
    "the header again": ("a,b,c\n" + HEAD, r"line 3: repeats the header"),
    "a zero byte": ("a,b,c\0\n", r"line 2: holds the control character U\+0000"),
    "an escape": ("a,b\x1b[0m,c\n", r"line 2: holds the control character U\+001B"),
    "a Unicode line end": ("a,b\u2028,c\n", r"line 2: holds the control character U\+2028"),
    "a tab": ("a,b\tb,c\n", r"line 2: generator .*holds a tab"),
}


def table(tmp_path, data, required=("path", "generator", "object")):
    (tmp_path / "t.csv").write_bytes(data if isinstance(data, bytes) else data.encode())
    return CsvTable(tmp_path / "t.csv", required=required, optional=("split",), field="source")


@pytest.mark.parametrize("case", GOOD)
def test_harmless_differences_are_read(tmp_path, case):
    text, expected = GOOD[case]
    rows = [(r["path"], r["generator"], r["object"]) for _, r in table(tmp_path, text).rows()]
    assert rows == expected


def test_lines_are_counted_as_an_editor_does(tmp_path):
    assert [n for n, _ in table(tmp_path, HEAD + "a,b,c\n\n\nd,e,f\n").rows()] == [2, 5]


@pytest.mark.parametrize("case", BAD)
def test_damaged_rows_are_errors_that_name_the_line(tmp_path, case):
    text, message = BAD[case]
    with pytest.raises(UserError, match=message) as error:
        list(table(tmp_path, HEAD + text).rows())
    assert "\n" not in str(error.value) and "t.csv" in str(error.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"path;generator;object\na;b;c\n", "no column 'path'.*separated by ';', write it with commas"),
        (b"path\tgenerator\tobject\na\tb\tc\n", "no column 'path'.*separated by tabs"),
        (b"sep=,\npath,generator,object\na,b,c\n", "no column 'path'.*remove this line of a spreadsheet"),
        (b"a/1.png,glide,cat\n", "no column 'path'.*the first line must name the columns"),
        (b"path|generator|object\n", "no column 'path'.*separated by '|'"),
        ((HEAD + "a,b,c").encode("utf-16"), "is UTF-16, expected UTF-8.*iconv -f UTF-16 -t UTF-8"),
        ((HEAD + "a,b,c").encode("utf-16-be"), "is UTF-16, expected UTF-8"),
        ((HEAD + "a,b,c").encode("utf-32"), "is UTF-32, expected UTF-8"),
        (b"path,generator,object,object\na,b,c,d\n", "the header has the column 'object' twice"),
        (b"path,generator,object,Object \na,b,c,d\n", "the header has the column 'object' twice"),
        (b"path,generator,object,prompt,prompt\n", "the header has the column 'prompt' twice"),
        (b"path,generator,object,\na,b,crane, bird\n", "line 2: 'bird' is in column 4.*does not name"),
        (b"PK\x03\x04rest", "is a zip file or a workbook, expected a CSV file"),
        (b"\x1f\x8b\x08rest", "is packed by gzip, expected a CSV file"),
        (b"", "no column 'path'; expected path, generator, object .*found nothing"),
    ],
)
def test_other_formats_and_headers_are_named(tmp_path, data, message):
    with pytest.raises(UserError, match=message):
        list(table(tmp_path, data).rows())


def test_a_file_that_cannot_be_read(tmp_path):
    for path in (tmp_path / "none.csv", tmp_path, tmp_path / "a\0b"):
        with pytest.raises(UserError, match="cannot be read"):
            CsvTable(path, required=("path",), field="source")


def test_bytes_that_are_not_utf8_are_kept_as_file_names_have_them(tmp_path):
    ((_, row),) = table(tmp_path, HEAD.encode() + b"caf\xe9.jpg,b,c\n").rows()
    assert row["path"] == "caf\udce9.jpg" and not is_utf8(row["path"]) and is_utf8(row["object"])


@pytest.mark.parametrize(
    "rows",
    [
        'a.png,b,c,"x\nd.png,e,f,y\ng.png,h,i,"z"\n',
        'a,b,c,"x\nd,e,f,y\ng,h,i,"z"\n',
        'a,b,c,"x\nd,e,f,"y"\n',
        'a,b,c,"x\nd,e,f,y\n',
        'a,b,c,"x\n"y\n',
    ],
)
def test_a_forgotten_quote_in_another_column_swallows_no_row(tmp_path, rows):
    with pytest.raises(UserError, match=r"line 2: a quote"):
        list(table(tmp_path, "path,generator,object,prompt\n" + rows).rows())
