"""A damaged label table gives the same labels or an error, never other labels."""

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dataio.core.errors import UserError
from dataio.layouts.manifest import ManifestLayout

TABLE = (
    "path,generator,object,split,group\n"
    "0.jpg,nature,cat,train,a\n"
    '1.jpg,glide,"crane, bird",train,b\n'
    "2.jpg,nature,caf\u00e9,val,c\n"
    '3.jpg,adm,"24"" screen",test,d\n'
    "\n"
    "4.jpg,real,,train,e\n"
    '5.jpg,"glide",dog,test,\n'
)
INSERTED = ['"', '""', "\n", "\r", "\r\n", "\0", "\x1b", "\x7f", "\x85", "\u2028", "\ufeff", "\u200b", " "]
CODECS = ["latin-1", "cp1252", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig", "cp437"]
SEPARATORS = [";", "\t", "|", ", ", " ,"]


def labels(folder):
    layout = ManifestLayout(folder / "m.csv")
    return {
        record.path: (
            record.generator,
            None if record.object is None else layout.objects[record.object],
            record.split,
            record.group,
        )
        for record in layout.records()
    }


def _bare_commas():
    """Places of the commas that separate fields."""
    inside, places = False, []
    for place, character in enumerate(TABLE):
        inside ^= character == '"'
        if character == "," and not inside:
            places.append(place)
    return places


@st.composite
def damaged(draw):
    kind = draw(
        st.sampled_from(["drop", "double", "insert", "insert", "insert", "join", "codec", "separator"])
    )
    if kind in ("drop", "double"):
        place = draw(st.sampled_from(_bare_commas()))
        return TABLE[:place] + ("" if kind == "drop" else ",,") + TABLE[place + 1 :], "utf-8"
    if kind == "insert":
        place = draw(st.integers(0, len(TABLE)))
        return TABLE[:place] + draw(st.sampled_from(INSERTED)) + TABLE[place:], "utf-8"
    if kind == "join":
        place = draw(st.sampled_from([n for n, c in enumerate(TABLE) if c == "\n"]))
        return TABLE[:place] + TABLE[place + 1 :], "utf-8"
    if kind == "codec":
        return TABLE, draw(st.sampled_from(CODECS))
    return TABLE.replace(",", draw(st.sampled_from(SEPARATORS))), "utf-8"


def test_no_damage_changes_a_label_silently(tmp_path):
    for number in range(6):
        (tmp_path / f"{number}.jpg").write_bytes(b"x")
    (tmp_path / "m.csv").write_text(TABLE)
    expected = labels(tmp_path)
    assert len(expected) == 6 and expected["1.jpg"] == ("glide", "crane, bird", "train", "b")

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(damaged())
    @example((TABLE.replace("nature,cat", 'nature,"cat'), "utf-8"))
    @example((TABLE.replace('"crane, bird"', "crane, bird"), "utf-8"))
    @example((TABLE.replace("nature,cat,train,a", "nature"), "utf-8"))
    @example((TABLE.replace("nature,cat", "n ature,cat"), "utf-8"))
    def run(case):
        text, codec = case
        (tmp_path / "m.csv").write_bytes(text.encode(codec, "replace"))
        try:
            found = labels(tmp_path)
        except UserError as error:
            assert "m.csv" in str(error) and "\n" not in str(error)
            return
        # A space or a doubled quote may be the value's own; no row is lost or becomes real or fake.
        assert {path: row[0] == "nature" for path, row in found.items()} == {
            path: row[0] == "nature" for path, row in expected.items()
        }
        if all(text.count(own) == TABLE.count(own) for own in (" ", '""')):
            assert found == expected

    run()


@pytest.mark.parametrize("place", range(0, len(TABLE), 3))
def test_a_quote_anywhere_is_an_error(tmp_path, place):
    for number in range(6):
        (tmp_path / f"{number}.jpg").write_bytes(b"x")
    (tmp_path / "m.csv").write_text(TABLE[:place] + '"' + TABLE[place:])
    with pytest.raises(UserError, match=r"m\.csv: (line \d|no column|the header)"):
        labels(tmp_path)
