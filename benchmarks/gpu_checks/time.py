"""Where the time of a step goes: kernels, and waiting for the host."""

import collections

import common

from gpu_checks import check


@check("time", 120)
def profile_of_training(size):
    """The ten most expensive kernels of 20 steps, and how long the device waited, from TensorFlow's profiler."""
    import training_step

    tf, dtype = common.start_tensorflow("bfloat16" if size.full else "float32")
    xla = bool(tf.config.list_physical_devices("GPU"))
    step = training_step.ours("naive", size.n_feat, size.image_size, size.batch, dtype, {"parts": 1, "xla": xla})
    for _ in range(5):
        step()
    count = 20 if size.full else 3
    wall, events = common.profile(step, count)
    kernels, busy = collections.Counter(), union([span for _, *span in events])
    for name, begin, end in events:
        kernels[name] += end - begin
    longest = {f"{name[:80]}, ms": round(1e3 * seconds / count, 3) for name, seconds in kernels.most_common(10)}
    return {
        "wall, ms a step": round(1e3 * wall / count, 2),
        "busy, ms a step": round(1e3 * busy / count, 2),
        "fraction of the time the device waits": round(max(0.0, 1 - busy / wall), 3),
        **longest,
    }


def union(spans):
    """The length of what intervals cover together."""
    covered, end = 0.0, float("-inf")
    for begin, stop in sorted(spans):
        covered += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    return covered
