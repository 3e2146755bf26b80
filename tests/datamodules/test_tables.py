import pytest

from rl4med_ddpo.datamodules.tables import read_table, to_numbers
from rl4med_ddpo.foundation.errors import UserError, name_few


def write(tmp_path, content):
    path = tmp_path / "table.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def error(path, *columns):
    with pytest.raises(UserError) as caught:
        read_table(path, columns)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        "image,hair\nISIC_1,0\nISIC_2,1\n",
        "image,hair\r\nISIC_1,0\r\nISIC_2,1\r\n",
        b"\xef\xbb\xbfimage,hair\r\nISIC_1,0\r\nISIC_2,1",
        ";image;hair\n0;ISIC_1.png;0\n1;ISIC_2.png;1\n",
        ",image,ink,hair\n7,ISIC_1_downsampled,1,0\n\n8,ISIC_2.JPG,1,1\n\n",
        'image,"hair"\n"ISIC_1","0"\n"ISIC_2","1"\n',
    ],
    ids=["lf", "crlf", "bom", "semicolon-png", "unnamed-column-blank-lines", "quoted"],
)
def test_forms_that_are_accepted(tmp_path, content):
    table = read_table(write(tmp_path, content), ["hair"])
    assert table["id"].tolist() == ["ISIC_1", "ISIC_2"]
    assert table["hair"].tolist() == ["0", "1"]


def test_stem_and_line(tmp_path):
    table = read_table(write(tmp_path, "image\nISIC_1_downsampled.jpg\n\nISIC_2\n"))
    assert table["stem"].tolist() == ["ISIC_1_downsampled", "ISIC_2"]
    assert table["line"].tolist() == [2, 4]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["empty"]),
        ("image,hair\r\n", ["empty", "header"]),
        (",,\n,,\n", ["empty"]),
        ("  <!DOCTYPE html><html>log in</html>", ["web page", "HTML", "raw"]),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ["git lfs pull"]),
        (b"PK\x03\x04\x14\0\x06\0", ["null byte", "UTF-8"]),
        (b"image,hair\nISIC_\xe9,1\n", ["UTF-8"]),
        ("name,hair\nISIC_1,1\n", ["no column image", "It has: name, hair"]),
        ("image,ruler\nISIC_1,1\n", ["no column hair", "Needed: image, hair"]),
        ("image,hair\nISIC_1,1\nISIC_2\n", ["1 row(s)", "line 3 has 1", "2 cells", "cut off"]),
        ("image,hair\nISIC_1,1,0\n", ["line 2 has 3"]),
        ("image,hair\nISIC_1,1\nISIC_2,1\nISIC_1.png,1\n", ["1 image id", "ISIC_1 in lines 2, 4"]),
        ("image,hair,hair\nISIC_1,1,0\n", ["several columns named hair", "Rename or remove"]),
        ("image,image,hair\nISIC_1,ISIC_2,0\n", ["several columns named image"]),
        ("image,hair\nISIC_1,1\nISIC_1_downsampled,1\n", ["ISIC_1 in lines 2, 3", "_downsampled"]),
    ],
)
def test_malformed_tables(tmp_path, content, words):
    message = error(write(tmp_path, content), "hair")
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "a b",
        "",
        ".png",
        "_downsampled",
        "é",
        "A" * 300,
        "C:\\x",
        "a/../b",
        "a//b",
        "a/.b",
        ".a",
        "-a",
        "a/",
        "a\\b",
    ],
)
def test_malformed_ids(tmp_path, name):
    message = error(write(tmp_path, f"image,hair\nISIC_1,1\n{name},1\n"), "hair")
    assert "1 image id(s) are malformed" in message
    assert "in line 3" in message
    assert repr(name[:100])[1:-1] in message
    assert len(message) < 700


def test_null_byte_in_an_id(tmp_path):
    assert "line 3" in error(write(tmp_path, b"image,hair\nISIC_1,1\nISIC\0_2,1\n"), "hair")


def test_missing_file(tmp_path):
    assert "No such file" in error(tmp_path / "absent.csv")


@pytest.mark.parametrize("value", ["nan", "NaN", "1.2", "-0.1", "", "yes", "inf", "0,5", "1e-400x"])
def test_values_that_are_no_probability(tmp_path, value):
    path = write(tmp_path, f'image,hair,ink\nISIC_1,0.5,1\nISIC_2,0,"{value}"\n')
    table = read_table(path, ["hair", "ink"])
    with pytest.raises(UserError) as caught:
        to_numbers(table, ["hair", "ink"], path)
    message = str(caught.value)
    assert str(path) in message
    assert "1 value(s) are not labels (0 or 1) or probabilities (0 to 1)" in message
    assert f"ink of ISIC_2 is {value!r} in line 3" in message


def test_a_probability_is_no_label(tmp_path):
    path = write(tmp_path, "image,MEL\nISIC_1,0.5\nISIC_2,1.0\nISIC_3,0\n")
    table = read_table(path, ["MEL"])
    with pytest.raises(UserError, match=r"1 value\(s\) are not labels \(0 or 1\): MEL of ISIC_1"):
        to_numbers(table, ["MEL"], path, labels_only=True)
    assert to_numbers(table, ["MEL"], path)["MEL"].tolist() == [0.5, 1.0, 0.0]


def test_many_are_counted_and_three_named(tmp_path):
    assert name_few("ab") == "a, b"
    assert name_few(range(1005)) == "0, 1, 2 and 1,002 more"
    rows = "".join(f"bad id {i}\n" for i in range(9))
    message = error(write(tmp_path, "image\n" + rows))
    assert "9 image id(s)" in message
    assert "and 6 more" in message
    assert "bad id 3" not in message
