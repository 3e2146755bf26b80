import numpy as np
import torch

from rl4med_ddpo.report.sheet import Panel, in_rows, sheet


def caption_grid(images, captions, columns):
    panels = [Panel([image], text) for image, text in zip(images, captions, strict=True)]
    return sheet(in_rows(panels, columns))


def colours(n, size):
    return torch.arange(1, n + 1).view(n, 1, 1, 1).expand(n, 3, size, size) * 0.1


def test_images_stand_row_by_row_and_keep_their_colours():
    grid = np.asarray(caption_grid(colours(5, 32), ["x"] * 5, columns=3))
    side, margin = 128, 4
    cell = (grid.shape[0] - margin) // 2
    assert grid.shape[1] == 3 * (side + margin) + margin
    for i in range(5):
        x, y = margin + i % 3 * (side + margin), margin + i // 3 * cell
        tile = grid[y : y + side, x : x + side]
        assert np.unique(tile).tolist() == [round(255 * (i + 1) * 0.1)]
    empty = grid[margin + cell : margin + cell + side, 2 * (side + margin) + margin :]
    assert np.unique(empty).tolist() == [255]


def test_small_images_grow_by_whole_factors_and_large_ones_shrink():
    pixels = torch.rand(1, 3, 48, 48)
    grid = np.asarray(caption_grid(pixels, [""], columns=1))
    tile = grid[4 : 4 + 144, 4 : 4 + 144]
    expected = (pixels[0] * 255).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(tile, expected.repeat(3, axis=0).repeat(3, axis=1))
    assert caption_grid(torch.rand(1, 3, 512, 512), [""], columns=1).width == 256 + 8


def test_captions_are_below_their_image_and_within_its_width():
    long = "MEL: hair, gel bubble, ruler, ink r=0.83"
    grid = np.asarray(caption_grid(torch.ones(2, 3, 32, 32), [long, ""], columns=2))
    dark = np.argwhere(grid.min(axis=2) < 128)
    assert len(dark) > 100
    assert dark[:, 0].min() > 4 + 128
    assert dark[:, 1].max() < 4 + 128
    lines = np.flatnonzero((grid.min(axis=2) < 128).any(axis=1))
    assert lines.max() - lines.min() > 15  # two lines of text


def test_values_outside_the_unit_range_do_not_wrap():
    images = torch.stack([torch.full((3, 128, 128), 1.2), torch.full((3, 128, 128), -0.2)])
    grid = np.asarray(caption_grid(images, ["", ""], columns=2))
    assert grid[60, 60].tolist() == [255] * 3
    assert grid[60, 200].tolist() == [0] * 3


def test_bfloat16_images_are_drawn():
    assert caption_grid(torch.rand(1, 3, 16, 16).bfloat16(), ["x"], columns=1).width == 136


def test_a_table_has_its_images_in_columns_and_says_where_there_are_none():
    red, blue = (torch.zeros(3, 128, 128, dtype=torch.uint8) for _ in range(2))
    red[0], blue[2] = 255, 255
    rows = [[Panel([red, red]), Panel([blue])], [Panel([]), Panel([blue])]]
    drawn = np.asarray(sheet(rows, labels=["one", "two"], headings=["left", "right"], title="all"))
    reds = np.argwhere((drawn == [255, 0, 0]).all(axis=2))
    blues = np.argwhere((drawn == [0, 0, 255]).all(axis=2))
    assert (len(reds), len(blues)) == (2 * 128**2, 2 * 128**2)
    assert reds[:, 1].max() < blues[:, 1].min()
    assert reds[:, 0].min() == blues[:, 0].min() > 2 * 22
    # the left half of the second row holds the words "no image" alone
    second = drawn[blues[:, 0].max() - 127 :, : blues[:, 1].min()]
    assert 20 < (second.min(axis=2) < 200).sum() < 1000


def test_a_framed_image_is_red_at_its_edge_and_keeps_its_size():
    grey = torch.full((3, 128, 128), 0.5)
    plain, framed = (np.asarray(sheet([[Panel([grey, grey], framed=some)]])) for some in ((), (1,)))
    assert plain.shape == framed.shape
    changed = (plain != framed).any(axis=2)
    assert (framed[changed] == (255, 0, 0)).all()
    left, top = 4 + 128 + 2, 4
    assert changed.sum() == 128**2 - 120**2
    assert changed[top, left]
    assert not changed[top + 4, left + 4]
