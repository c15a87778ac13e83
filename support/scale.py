"""Which values of their source the stored integers of images stand for."""

import dataclasses

import numpy as np

from support.checks import check_finite


@dataclasses.dataclass(frozen=True)
class Scale:
    """How stored integers stand for the values of a source: 0 … levels for black … white.

    Attributes:
        black, white: the lowest and the highest value, in the units of the source.
        levels: how many steps lie between them, 1 … 65,535: 255 for 8 bits.
    """

    black: float = 0
    white: float = 255
    levels: int = 255

    @property
    def step(self) -> float:
        """How far neighbouring levels lie apart, in the units of the source."""
        return (self.white - self.black) / self.levels

    @property
    def dtype(self) -> type:
        """The type of stored integers."""
        return np.uint8 if self.levels <= 255 else np.uint16

    def store(self, values: np.ndarray) -> np.ndarray:
        """Values of a source as the nearest stored integers; those beyond black and white are clipped."""
        values = values.astype(np.float32 if self.levels == 255 else np.float64)
        levels = (values - self.black) * (self.levels / (self.white - self.black))
        return np.clip(np.rint(levels), 0, self.levels).astype(self.dtype)

    def to_bytes(self, images: np.ndarray) -> np.ndarray:
        """Stored images as uint8, 0 … 255, for features and for the eye."""
        return images if self.levels == 255 else np.rint(images * (255 / self.levels)).astype(np.uint8)

    def to_values(self, x_0: np.ndarray) -> np.ndarray:
        """Images in [-1, 1] as values of the source, float32, not rounded.

        Raises:
            FloatingPointError: for values that are NaN or infinite.
        """
        check_finite(x_0)
        return np.float32(self.black + (x_0.astype(np.float64) + 1) / 2 * (self.white - self.black))
