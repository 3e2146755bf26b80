"""Join ISIC 2019's tables to one: which image shows which of the six attributes."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from rl4med_ddpo.datamodules.tables import read_table, to_numbers
from rl4med_ddpo.datamodules.vocabulary import DERMOSCOPY, Vocabulary
from rl4med_ddpo.foundation.errors import UserError, name_few

GROUND_TRUTH = "ISIC_2019_Training_GroundTruth.csv"
METADATA = "ISIC_2019_Training_Metadata.csv"
ARTIFACT_FILES = ("isic_inferred_wocarcinoma.csv", "isic_bias.csv")
ARTIFACT_FOLDERS = (".", "annotations")
COLUMNS = ("id", "stem", "named_in", "lesion_id", "source")


@dataclass(frozen=True)
class Annotations:
    """The joined table, and what did not make it into the join.

    Attributes:
        frame: Sorted by id, with the columns `id`, `stem` (the image file's name without its
            ending), `named_in` (table:line), `lesion_id` and `source` (empty where unknown), and
            the attributes (0, 1).
        without_artifacts: Images of each disease that have no row in the artifact file.
        artifacts_csv: The artifact file.
    """

    frame: pd.DataFrame
    without_artifacts: dict[str, int]
    artifacts_csv: Path


def read_annotations(
    root: Path,
    artifacts_csv: Path | None = None,
    threshold: float = 0.9,
    table: Path | None = None,
    vocabulary: Vocabulary = DERMOSCOPY,
) -> Annotations:
    """Join ground truth, metadata and artifacts, and keep the melanomas and nevi.

    Args:
        root: Folder of the official tables.
        artifacts_csv: Table of `image` and the four artifacts, as probabilities or as 0 and 1. By
            default the first of `ARTIFACT_FILES` in the root or in its folder `annotations`.
        threshold: In [0, 1); an artifact is present if its value is greater.
        table: One table in place of ISIC's: `image`, `group` (images that must not be parted, such
            as a patient's; may be empty), and each attribute, as a probability or as 0 and 1.
        vocabulary: The attributes.

    Raises:
        UserError: if a table is missing or malformed, or if the tables do not belong together.
    """
    if not 0 <= threshold < 1:
        raise UserError(f"threshold must be in [0, 1), it is {threshold}. The paper's is 0.9.")
    if table is not None:
        return _one_table(table, threshold, vocabulary)
    if not root.is_dir():
        raise UserError(
            f"there is no folder {root}.\n  root is the folder that holds {GROUND_TRUTH}, "
            f"{METADATA} and the images' folder ISIC_2019_Training_Input."
        )
    diseases = _read_diseases(_official(root, GROUND_TRUTH), vocabulary.one_of)
    names = list(vocabulary.any_of)
    artifacts_csv = _artifact_file(root, artifacts_csv, names)
    artifacts = to_numbers(read_table(artifacts_csv, names), names, artifacts_csv)
    artifacts[names] = (artifacts[names] > threshold).astype(int)
    joined = diseases.merge(artifacts[["id", *names]], on="id")
    if joined.empty:
        raise UserError(
            f"no melanoma or nevus of {root / GROUND_TRUTH} has a row in {artifacts_csv}.\n"
            f"  ids there: {name_few(diseases['id'])}; here: {name_few(artifacts['id'])}.\n"
            "  Take the artifact file of ISIC 2019."
        )
    joined = _add_lesions(joined, _official(root, METADATA))
    lost = diseases[~diseases["id"].isin(joined["id"])]
    frame = joined.sort_values("id", ignore_index=True)[[*COLUMNS, *vocabulary.attributes]]
    return Annotations(frame, {d: int(lost[d].sum()) for d in vocabulary.one_of}, artifacts_csv)


def _one_table(path: Path, threshold: float, vocabulary: Vocabulary) -> Annotations:
    names, ones = list(vocabulary.attributes), list(vocabulary.one_of)
    frame = to_numbers(read_table(path, ("group", *names)), names, path)
    frame[names] = (frame[names] > threshold).astype(int)
    if ones:
        wrong = frame.loc[frame[ones].sum(axis=1) != 1, "id"]
        if len(wrong):
            raise UserError(
                f"{path}: {len(wrong):,} image(s) do not have exactly one of {', '.join(ones)}:"
                f" {name_few(wrong)}.\n  Correct or remove these lines."
            )
    frame = _with_places(frame, path).rename(columns={"group": "lesion_id"}).assign(source="")
    frame = frame.sort_values("id", ignore_index=True)[[*COLUMNS, *names]]
    return Annotations(frame, {}, path)


def _with_places(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    return table.assign(named_in=[f"{path}:{line}" for line in table["line"]])


def _official(root: Path, name: str) -> Path:
    if not (root / name).is_file():
        raise UserError(
            f"the table {root / name} is missing.\n"
            "  Download it from https://challenge.isic-archive.com/data/#2019 (training data)\n"
            f"  into {root}, or give the folder that holds it as root."
        )
    return root / name


def _artifact_file(root: Path, given: Path | None, names: list[str]) -> Path:
    tried = (
        [root / f / n for n in ARTIFACT_FILES for f in ARTIFACT_FOLDERS]
        if given is None
        else [given]
    )
    found = next((path for path in tried if path.is_file()), None)
    if found is None:
        raise UserError(
            "there is no artifact table; looked for:\n"
            + "".join(f"    {path}\n" for path in tried)
            + "  isic_inferred_wocarcinoma.csv comes from\n"
            "  https://github.com/alceubissoto/artifact-generalization-skin; any table with the\n"
            f"  columns image, {', '.join(names)} serves: give it as artifacts_csv."
        )
    return found


def _read_diseases(path: Path, names: tuple[str, ...]) -> pd.DataFrame:
    table = to_numbers(read_table(path, names), names, path, labels_only=True)
    several = table[table[list(names)].sum(axis=1) > 1]
    if len(several):
        raise UserError(
            f"{path}: {len(several):,} image(s) are both {' and '.join(names)}: "
            f"{name_few(several['id'])}.\n"
            "  They exclude each other. Download the table again, or correct these lines."
        )
    table = table[table[list(names)].sum(axis=1) == 1]
    if table.empty:
        raise UserError(f"{path} is empty of {' and '.join(names)}: no row has a 1 there.")
    table = _with_places(table, path)[["id", "stem", "named_in", *names]]
    return table.astype(dict.fromkeys(names, int))


def _add_lesions(joined: pd.DataFrame, path: Path) -> pd.DataFrame:
    metadata = read_table(path, ("lesion_id",))
    missing = joined.loc[~joined["id"].isin(metadata["id"]), "id"]
    if len(missing):
        raise UserError(
            f"{path} has no row for {len(missing):,} of {len(joined):,} images: "
            f"{name_few(missing)}.\n  Without it nobody knows which images show the same lesion. "
            "Take ground truth and\n  metadata of the same release."
        )
    joined = joined.merge(metadata[["id", "lesion_id"]], on="id")
    # HAM_0000118, BCN_0003884, MSK4_0011169: the collection is the part before the underscore
    source = joined["lesion_id"].str.partition("_")[0].str.rstrip("0123456789")
    return joined.assign(source=source)
