"""`model.csv` beside the model: one row for every epoch, also across interruptions."""

import csv
import os
import time

from support import files

TRAINING_COLUMNS = ("epoch", "step", "loss_sum", "loss_mean", "seconds", "images_per_second", "learning_rate")
HELD_OUT_COLUMNS = ("held_out_loss", "held_out_q1", "held_out_q2", "held_out_q3", "held_out_q4")
COLUMNS = TRAINING_COLUMNS + HELD_OUT_COLUMNS  # a held-out loss is empty where it was not measured
FIRST_COLUMNS = len(TRAINING_COLUMNS)  # in files of the earliest version
ENCODINGS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}  # by the first two bytes; else UTF-8


class History:
    """The table of a run that resumes after `epoch` epochs; rows of later epochs, which were lost, are dropped.

    Raises:
        ValueError: if there is a file of that name that this program did not write.
    """

    def __init__(self, path: str, epoch: int):
        self.path, self.written_at = path, 0.0
        self.rows = [row for row in read_rows(path) if int(row[0]) < epoch]

    def held_out(self) -> list[tuple[float, float]]:
        """Pairs (mean training loss, held-out loss) of the epochs in which the second was measured."""
        mean, held_out = COLUMNS.index("loss_mean"), COLUMNS.index("held_out_loss")
        return [(float(row[mean]), float(row[held_out])) for row in self.rows if row[held_out] != ""]

    def write(self) -> None:
        """Writes the table. Raises OSError if it cannot be written; the rows stay for the next attempt."""
        with files.replacing(self.path) as draft, open(draft, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *self.rows])
        self.written_at = time.monotonic()


def read_rows(path: str) -> list[list[str]]:
    """The rows of a table as lists of text, also when a spreadsheet has saved it; none if there is no such file.

    Raises:
        ValueError: if this program did not write it.
    """
    if not os.path.isfile(path):
        return []
    with open(path, "rb") as file:
        content = file.read()
    try:
        lines = content.decode(ENCODINGS.get(content[:2], "utf-8-sig")).splitlines()
        return _parse([line for line in lines if line.strip()])
    except ValueError as error:
        raise ValueError(
            f"{path} is not a table of epochs that this program wrote ({error}), and would be overwritten; rename it, "
            "or choose another --model"
        ) from error


def _parse(lines):
    """The rows below the header, each of the full width. Raises ValueError for anything else."""
    if not lines:
        return []
    delimiter = next((mark for mark in ",;\t" if mark in lines[0]), ",")
    header, *rows = csv.reader(lines, delimiter=delimiter)
    if len(header) < FIRST_COLUMNS or tuple(header) != COLUMNS[: len(header)]:
        raise ValueError("its header is different")
    if delimiter != ",":  # of a spreadsheet that writes 0,5 for 0.5
        rows = [[cell.replace(",", ".") for cell in row] for row in rows]
    for row in rows:
        if len(row) != len(header) or not row[0].isdigit():
            raise ValueError(f"the row of epoch {row[0]} is damaged")
        for cell in filter(None, row):
            float(cell)
    return [row + [""] * (len(COLUMNS) - len(row)) for row in rows]
