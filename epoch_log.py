"""`model.csv` beside the model: one row for every epoch, also across interruptions."""

import csv
import os
import time

import files

COLUMNS = ("epoch", "step", "loss_sum", "loss_mean", "seconds", "images_per_second", "learning_rate")


class EpochLog:
    """The table of a run that goes on after `epoch` epochs; later rows of a lost run are dropped."""

    def __init__(self, path, epoch):
        self.path, self.rows, self.written_at = path, [], 0.0
        if os.path.exists(path):
            with open(path, newline="") as file:
                rows = [row for row in csv.reader(file) if row and row[0].isdigit()]
            self.rows = [row for row in rows if int(row[0]) < epoch]

    def write(self):
        """Raises OSError if it cannot be written; the rows are kept for the next time."""
        with files.replacing(self.path) as draft, open(draft, "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *self.rows])
        self.written_at = time.monotonic()
