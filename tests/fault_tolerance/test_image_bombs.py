import resource
import struct
import zlib

import pytest
from PIL import Image

from rl4med_ddpo.datamodules.images import MAX_PIXELS, read_image
from rl4med_ddpo.foundation.errors import UserError
from support.forked import forked

FRAME = bytes.fromhex("2c000000000100010000020144 00")


def png(path):
    """20,000 x 20,000 pixels, all black, in 48 KB."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(2501 * 20_000), 9)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def jpeg(path):
    """60 million pixels."""
    Image.new("L", (8_000, 7_500)).save(path)


def gif(path):
    """Ten thousand frames under the name of a JPEG."""
    screen = bytes.fromhex("474946383961 0100 0100 800000 000000 ffffff")
    path.write_bytes(screen + FRAME * 10_000 + b";")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (png, ["400,000,000 pixels", f"{MAX_PIXELS:,}"]),
        (jpeg, ["60,000,000 pixels", f"{MAX_PIXELS:,}"]),
        (gif, ["cannot decode"]),
    ],
)
def test_an_image_made_to_exhaust_the_memory_is_refused_without_decoding(tmp_path, make, says):
    path = tmp_path / f"bomb.{'png' if make is png else 'jpg'}"
    assert forked(make, path) == 0
    assert path.stat().st_size < 1_000_000

    def grows_little():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(UserError) as error:
            read_image(path, 64)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 200_000, f"{grown} KB"
        for part in (str(path), *says):
            assert part in str(error.value)

    assert forked(grows_little) == 0
