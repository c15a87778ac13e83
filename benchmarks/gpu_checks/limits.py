"""Largest batches, memory of a step."""

import gc

import common

from gpu_checks import check


@check("limits", 150, needs=("tensorflow", "gpu"))
def memory_of_a_step(size):
    """Peak memory of training steps at two batch sizes, and the largest batch that follows from them."""
    import training_step

    tf, _ = common.start_tensorflow("float32")
    results = {}
    for n_feat, image_size, batches in (size.n_feat, size.image_size, (16, 32)), (16, 32, (256, 512)):
        peaks = []
        for batch in batches:
            gc.collect()  # the model before
            tf.config.experimental.reset_memory_stats("GPU:0")
            training_step.ours("naive", n_feat, image_size, batch, "float32", {"parts": 1, "xla": True})()
            peaks.append(tf.config.experimental.get_memory_info("GPU:0")["peak"])
        each = (peaks[1] - peaks[0]) / (batches[1] - batches[0])
        fixed = peaks[0] - batches[0] * each
        name = f"n_feat {n_feat}, {image_size}×{image_size}"
        results |= {f"{name}: MB an image": round(each / 1e6, 1), f"{name}: GB besides": round(fixed / 1e9, 2)}
        results |= {f"{name}: largest batch in {gb} GB": int((gb * 0.94e9 - fixed) / each) for gb in (16, 24, 80)}
    return results
