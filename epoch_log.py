"""`model.csv` beside the model: one row for every epoch, also across interruptions."""

import csv
import os
import time

import files

COLUMNS = (
    "epoch", "step", "loss_sum", "loss_mean", "seconds", "images_per_second", "learning_rate",
    "held_out_loss", "held_out_q1", "held_out_q2", "held_out_q3", "held_out_q4",  # empty where not measured
)  # fmt: skip


class EpochLog:
    """The table of a run that goes on after `epoch` epochs; later rows of a lost run are dropped."""

    def __init__(self, path, epoch):
        self.path, self.rows, self.written_at = path, [], 0.0
        if os.path.exists(path):
            with open(path, newline="") as file:
                rows = [row for row in csv.reader(file) if row and row[0].isdigit()]
            self.rows = [row + [""] * (len(COLUMNS) - len(row)) for row in rows if int(row[0]) < epoch]

    def held_out(self):
        """Pairs (mean training loss, held-out loss) of the epochs in which the second was measured."""
        mean, held_out = COLUMNS.index("loss_mean"), COLUMNS.index("held_out_loss")
        return [(float(row[mean]), float(row[held_out])) for row in self.rows if row[held_out] != ""]

    def write(self):
        """Raises OSError if it cannot be written; the rows are kept for the next time."""
        with files.replacing(self.path) as draft, open(draft, "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *self.rows])
        self.written_at = time.monotonic()
